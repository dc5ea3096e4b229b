"""A run resumes on the data that it was started with; other data are refused or logged."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from dgpt_jax import train
from dgpt_jax.errors import UserError
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.training import resume
from tests.support import data
from tests.training import loop_test as train_test

BEFORE = {"examples": 16, "views": ["a", "b"], "teacher": "t"}
LABELLED = {"examples": 16, "views": ["a"], "classes": ["cat", "dog"]}
CHANGES = [
    (BEFORE, {}, []),
    (BEFORE, {"examples": 32, "views": ["c", "d"]}, ["32 16"]),
    (BEFORE, {"views": ["a", "b", "c"]}, ["3 config.data.views=2 2"]),
    (BEFORE, {"views": ["b", "a", "c"]}, ["3 2"]),
    (BEFORE, {"views": ["a"]}, ["1 2"]),
    (BEFORE, {"views": ["a", "c"]}, ["contents"]),
    (BEFORE, {"views": ["b", "a"]}, ["contents"]),
    (BEFORE, {"teacher": "u"}, ["teacher u t"]),
    (LABELLED, {"classes": ["dog", "cat"]}, ["dog, cat cat, dog"]),
    (LABELLED, {"classes": ["cat"], "views": ["b"]}, ["contents", "cat cat, dog"]),
]


@pytest.mark.parametrize(("before", "change", "expected"), CHANGES)
def test_changes_are_listed(before, change, expected):
    """Current values come before saved ones."""
    changes = resume.data_changes(before, before | change)
    assert len(changes) == len(expected)
    for line, words in zip(changes, expected, strict=True):
        assert re.search(r".*\b".join(map(re.escape, words.split(" "))), line), line


def test_changes_are_refused_or_logged(tmp_path):
    lines, now = [], BEFORE | {"views": ["a", "c"]}
    examples = SimpleNamespace(data=SimpleNamespace(path="S"), identity=lambda: now)
    with pytest.raises(UserError, match="S .*contents.* step 7.*--allow_config_change"):
        resume.check_data(BEFORE, examples, 7, lines.append, False)
    assert not lines
    resume.check_data(BEFORE, examples, 7, lines.append, True)
    resume.check_data(None, examples, 7, lines.append, False)
    assert "contents" in lines[0] and "step 7" in lines[1]


def run(store, workdir, *, allow: bool = False, **fields) -> int:
    steps = {"total": "2 steps", "optim": {"warmup": "1 steps"}, "checkpoint": {"every": "1 steps"}}
    config = train_test.settings(store, **steps, data=fields)
    return train.train(config, workdir, allow_config_change=allow)


@pytest.mark.slow
def test_a_store_with_an_added_view(tmp_path):
    dataset = data.image_dataset(tmp_path, per_class=8)
    teacher, workdir = data.random_teacher(tmp_path / "teacher"), tmp_path / "run"
    store = data.token_store(tmp_path, dataset, teacher, views=1)
    assert run(store, workdir) == 0
    shutil.rmtree(workdir / "checkpoints/2")
    data.token_store(tmp_path, dataset, teacher, views=2)
    with pytest.raises(UserError, match="--config.data.views=1"):
        run(store, workdir)
    assert run(store, workdir, views=1) == 0
    metadata = json.loads((workdir / "checkpoints/2/metadata/metadata").read_text())
    split = tfds_dataset.Split(store, "view000")
    assert metadata["data"]["examples"] == 16 and metadata["data"]["views"] == [split.digest]


def test_digests_depend_on_contents(tmp_path):
    """Of splits, slices, and as many other images."""
    one, other = (
        data.image_dataset(tmp_path / str(seed), per_class=8, seed=seed) for seed in (0, 1)
    )
    digests = [
        tfds_dataset.Split(path, split).digest
        for path, split in [
            (one, "train"),
            (one, "train[:8]"),
            (one, "train[8:]"),
            (other, "train"),
        ]
    ]
    assert len(set(digests)) == 4
    shutil.copytree(one, tmp_path / "moved")
    assert tfds_dataset.Split(tmp_path / "moved", "train").digest == digests[0]
