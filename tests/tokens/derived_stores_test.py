"""Extracted, merged and divided stores in training and verification, with a real teacher."""

import dataclasses
import sys

import numpy as np
import pytest

from dgpt_jax import train
from dgpt_jax.commands import store as command
from dgpt_jax.config import roots
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_store
from dgpt_jax.data.ingest import importer
from dgpt_jax.errors import UserError
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import build, verify
from tests.support import data
from tests.training import loop_test

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with a teacher, a store, one of other images with its codec, and derived ones."""
    root = tmp_path_factory.mktemp("derived")
    teacher = data.random_teacher(root / "teacher")
    dataset = data.image_dataset(root, per_class=12)
    store = data.token_store(root, dataset, teacher, views=2, shard_size=8)
    (root / "other").mkdir()
    data.write_folder(root / "other/all", 6, seed=1)
    for folder in (root / "other/all").iterdir():
        for file in folder.iterdir():
            file.rename(file.with_name(f"new_{file.name}"))
    importer.import_images(root / "other/all", root / "other/images", say=lambda _: 0)
    data.token_store(root / "other", root / "other/images", teacher, views=2, codec_from=str(store))
    for words in (
        ["extract", "{root}/tokens", "{root}/extracted", "--fraction=0.6"],
        ["merge", "{root}/tokens", "{root}/other/tokens", "{root}/merged"],
        ["split", "{root}/merged", "{root}/both", "--fraction=0.4"],
    ):
        run(root, *words)
    return root


def run(root, *words):
    before, sys.argv = sys.argv, ["store.py", *(word.format(root=root) for word in words)]
    try:
        command.main()
    finally:
        sys.argv = before


@pytest.mark.parametrize("name", ["extracted", "merged", "both/train", "both/heldout"])
def test_the_teacher_agrees(root, name):
    settings = parse(roots.TeacherConfig, {"weights": str(root / "teacher")})
    least = verify.thresholds(token_store.StoreInfo.load(root / name).teacher)
    reports = list(verify.verify(root / name, settings, batch_size=8))
    assert reports and all(report.is_sound(*least) for report in reports)
    with pytest.raises(UserError, match="--source"):
        next(verify.verify(root / name, settings, source=str(root / "images")))


def test_no_views_are_added(root):
    settings = dict(
        source=str(root / "images"), teacher={"weights": str(root / "teacher")}, image_size=16,
        image_encoding="png", shard_size=8, batch_size=8, threads=2, views=3,
    )  # fmt: skip
    with pytest.raises(UserError, match="--out"):
        build.build(parse(roots.TokensConfig, settings), root / "merged")


def test_training(root):
    """Trains on the merged store's first part with its second held out; refuses another store."""
    config = loop_test.settings(root / "both/train", total="2 steps")
    evals = dataclasses.replace(config.evals, heldout=str(root / "both/heldout"), every="2 steps")
    assert train.train(dataclasses.replace(config, evals=evals), root / "run") == 0
    log = (root / "run/metrics.jsonl").read_text()
    assert "heldout/next" in log
    for name in ("extracted", "merged"):
        assert train.train(loop_test.settings(root / name, total="1 steps"), root / name[:1]) == 0
    with pytest.raises(UserError, match="allow_config_change"):
        train.train(loop_test.settings(root / "extracted", total="2 steps"), root / "run")


def test_records_are_those_of_the_originals(root):
    originals = {
        view: {split.raw(i) for path in ("tokens", "other/tokens")
               for split in [tfds_dataset.Split(root / path, view)] for i in range(len(split))}
        for view in ("view000", "view001")
    }  # fmt: skip
    for name, share in {"merged": 1, "both/train": 0.6, "both/heldout": 0.4}.items():
        for view, expected in originals.items():
            split = tfds_dataset.Split(root / name, view)
            assert {split.raw(i) for i in range(len(split))} <= expected
            assert abs(len(split) / len(expected) - share) < 0.3 * (share < 1) + 1e-9
    cosines = [
        token_store.StoreInfo.load(root / name).teacher.cosine
        for name in ("merged", "tokens", "other/tokens")
    ]
    assert cosines[0][0] == min(cosines[1][0], cosines[2][0])
    assert np.isclose(cosines[0][1], np.average([cosines[1][1], cosines[2][1]], weights=[24, 12]))
