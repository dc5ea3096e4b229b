"""Bad numbers in supervised training: left out, and at last an end that can be looked at."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import checkpoint, images, replay, train, vit
from dgpt_jax.schema import UserError
from tests.classifying import settings
from tests.data import write_folder
from tests.train_test import metrics_of


@pytest.fixture
def black(tmp_path, monkeypatch):
    """24 pictures, the first of which is black; and black pictures have no finite numbers."""
    folder = tmp_path / "folder"
    write_folder(folder, 12)
    Image.new("RGB", (32, 24)).save(folder / "a/000.png")
    images.import_images(folder, tmp_path / "images", say=lambda _: 0)
    normalise = vit.normalise

    def poisoned(pictures, *args):
        dark = jnp.all(pictures == 0, axis=(1, 2, 3), keepdims=True)
        return jnp.where(dark, jnp.nan, normalise(pictures, *args))

    monkeypatch.setattr(vit, "normalise", poisoned)
    return tmp_path / "images"


def plain(path, **changes):
    classify = {"randaugment": "", "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    return settings(path, classify=classify, evals={"heldout": ""}, checkpoint={"best": ""},
                    **changes)  # fmt: skip


def test_a_step_of_bad_numbers_is_left_out(black, tmp_path):
    """One in each of two epochs of three steps; the moving average is spared, too."""
    assert train.train(plain(black), tmp_path / "run") == 0
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["skipped"] == 2 and [x["loss"] for x in lines].count("nan") == 2
    params, _ = checkpoint.load_params(tmp_path / "run")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_bad_numbers_stop_a_fine_tuning(black, tmp_path):
    run = plain(black, optim={"bad_steps": 2})
    for path in (tmp_path / "folder").glob("*/*.png"):
        Image.new("RGB", (32, 24)).save(path)
    shutil.rmtree(black)
    images.import_images(tmp_path / "folder", black, say=lambda _: 0)
    with pytest.raises(UserError, match="in all . steps from 0 on.*tools/replay.py") as error:
        train.train(run, tmp_path / "run")
    found = replay.replay(str(error.value).split()[-1])
    assert found.bad_examples() == found.ids and len(found.ids) == 8
    assert all(np.isfinite(norms).all() for norms in found.now["params"].values())
