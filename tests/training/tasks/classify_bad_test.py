"""Non-finite numbers in supervised training: skipped, and dumped after many in a row."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import train
from dgpt_jax.data.ingest import importer
from dgpt_jax.errors import UserError
from dgpt_jax.models import vit
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.training import bad_step_replay
from tests.support.classifying import settings
from tests.support.data import write_folder
from tests.training.loop_test import metrics_of


@pytest.fixture
def black(tmp_path, monkeypatch):
    """24 images, the first of which is black; black images are normalized to NaN."""
    folder = tmp_path / "folder"
    write_folder(folder, 12)
    Image.new("RGB", (32, 24)).save(folder / "a/000.png")
    importer.import_images(folder, tmp_path / "images", say=lambda _: 0)
    normalize = vit.normalize

    def poisoned(images, *args):
        is_black = jnp.all(images == 0, axis=(1, 2, 3), keepdims=True)
        return jnp.where(is_black, jnp.nan, normalize(images, *args))

    monkeypatch.setattr(vit, "normalize", poisoned)
    return tmp_path / "images"


def plain(path, **changes):
    classify = {"randaugment": "", "random_erase_prob": 0.0, "mixup": 0.0, "cutmix": 0.0}
    return settings(path, classify=classify, evals={"heldout": ""}, checkpoint={"best": ""},
                    **changes)  # fmt: skip


def test_non_finite_steps_are_skipped(black, tmp_path):
    """One in each of two epochs of three steps; the moving average stays finite, too."""
    assert train.train(plain(black), tmp_path / "run") == 0
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["skipped"] == 2 and [x["loss"] for x in lines].count("nan") == 2
    params, _ = orbax_checkpoint.load_params(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_bad_numbers_stop_fine_tuning(black, tmp_path):
    run = plain(black, optim={"max_skipped_in_a_row": 2})
    for path in (tmp_path / "folder").glob("*/*.png"):
        Image.new("RGB", (32, 24)).save(path)
    shutil.rmtree(black)
    importer.import_images(tmp_path / "folder", black, say=lambda _: 0)
    with pytest.raises(UserError, match="max_skipped_in_a_row.*tools/replay.py") as error:
        train.train(run, tmp_path / "run")
    replayed = bad_step_replay.replay(str(error.value).split()[-1])
    assert replayed.bad_examples() == replayed.ids and len(replayed.ids) == 8
    assert all(np.isfinite(norms).all() for norms in replayed.now["params"].values())
