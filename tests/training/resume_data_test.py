"""A run goes on with the data that it began with, or says that they are others."""

import json
import shutil
from types import SimpleNamespace

import pytest

from dgpt_jax import records, resume, train
from dgpt_jax.schema import UserError
from tests import data, train_test

BEFORE = {"examples": 16, "views": ["a", "b"], "teacher": "t"}
LABELLED = {"examples": 16, "views": ["a"], "classes": ["cat", "dog"]}
CHANGES = [
    (BEFORE, {}, []),
    (BEFORE, {"examples": 32, "views": ["c", "d"]}, ["has 32 examples, and had 16"]),
    (BEFORE, {"views": ["a", "b", "c"]}, ["has 3 views (--config.data.views=2 reads the same"]),
    (BEFORE, {"views": ["b", "a", "c"]}, ["is read with 3 views, and was with 2"]),
    (BEFORE, {"views": ["a"]}, ["is read with 1 views, and was with 2"]),
    (BEFORE, {"views": ["a", "c"]}, ["has other contents than"]),
    (BEFORE, {"views": ["b", "a"]}, ["has other contents than"]),
    (BEFORE, {"teacher": "u"}, ["has tokens of the teacher u, and had those of t"]),
    (LABELLED, {"classes": ["dog", "cat"]}, ["has 2 classes (dog, cat), and had 2 classes (cat"]),
    (LABELLED, {"classes": ["cat"], "views": ["b"]}, ["has other contents", "has 1 classes (cat)"]),
]


@pytest.mark.parametrize(("before", "change", "said"), CHANGES)
def test_what_differs(before, change, said):
    found = resume.data_changes(before, before | change)
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_changes_are_refused_or_said(tmp_path):
    said, now = [], BEFORE | {"views": ["a", "c"]}
    examples = SimpleNamespace(data=SimpleNamespace(path="S"), identity=lambda: now)
    progress = SimpleNamespace(say=said.append)
    with pytest.raises(UserError, match="S has other contents than in the checkpoint of step 7"):
        resume.check_data(BEFORE, examples, 7, progress, False)
    assert not said
    resume.check_data(BEFORE, examples, 7, progress, True)
    resume.check_data(None, examples, 7, progress, False)
    assert "other contents" in said[0] and "does not tell its data" in said[1]


def run(store, workdir, *, allow: bool = False, **fields) -> int:
    steps = {"total": "2 steps", "optim": {"warmup": "1 steps"}, "checkpoint": {"every": "1 steps"}}
    made = train_test.settings(store, **steps, data=fields)
    return train.train(made, workdir, allow_config_change=allow)


def test_a_view_more(tmp_path):
    dataset = data.image_dataset(tmp_path, per_class=8)
    teacher, workdir = data.random_teacher(tmp_path / "teacher"), tmp_path / "run"
    store = data.token_store(tmp_path, dataset, teacher, views=1)
    assert run(store, workdir) == 0
    shutil.rmtree(workdir / "checkpoints/2")
    data.token_store(tmp_path, dataset, teacher, views=2)
    with pytest.raises(UserError, match="has 2 views"):
        run(store, workdir)
    assert run(store, workdir, views=1) == 0
    metadata = json.loads((workdir / "checkpoints/2/metadata/metadata").read_text())
    split = records.Split(store, "view000")
    assert metadata["data"]["examples"] == 16 and metadata["data"]["views"] == [split.digest]


def test_the_digest_tells_contents(tmp_path):
    """Of splits, of slices, of other images in the same number."""
    one, other = (
        data.image_dataset(tmp_path / str(seed), per_class=8, seed=seed) for seed in (0, 1)
    )
    digests = [
        records.Split(path, split).digest
        for path, split in [
            (one, "train"),
            (one, "train[:8]"),
            (one, "train[8:]"),
            (other, "train"),
        ]
    ]
    assert len(set(digests)) == 4
    shutil.copytree(one, tmp_path / "moved")
    assert records.Split(tmp_path / "moved", "train").digest == digests[0]
