"""Scenes: deterministic, with masks that fit, and splits that share neither digits nor squares."""

import hashlib
import itertools

import numpy as np
import pytest

from dgpt_jax.data.ingest import importer
from dgpt_jax.examples import digits, image_sets, scenes, small_images
from dgpt_jax.storage import tfds_dataset

FIRST = 24  # scenes of a split that are looked at
SHA256 = {
    "train": "c78ba4612a8fc9c6b298a81d276064591ecd313a9b9d60ae3cb3e77e95639f68",
    "test": "40c4ea761d14c320ad1dc97fd20537b62ebc5af548b5c0e5f0fdb2ee0b806e0f",
}


@pytest.fixture(scope="module", params=scenes.COPIES)
def split(request):
    """(split, its first scenes)"""
    return request.param, list(itertools.islice(scenes.make_scenes(request.param), FIRST))


def test_scenes_are_deterministic(split):
    name, first = split
    text = b"".join(x.image.tobytes() + x.mask.tobytes() + x.caption.encode() for x in first)
    assert hashlib.sha256(text).hexdigest() == SHA256[name]


def test_masks_and_contrast(split):
    _, first = split
    for scene in first:
        assert scene.image.shape == (32, 32, 3) and scene.mask.shape == (32, 32)
        rows, columns = np.nonzero(scene.mask)
        for places in (rows, columns):  # a digit is at most 24 pixels wide and high
            assert 5 <= np.ptp(places) + 1 <= 24
        # Outside the digit there is background, under it mostly its color.
        assert (scene.image != scene.background)[scene.mask].any(axis=1).all()
        far = np.abs(scene.image - scene.background.astype(float)).max(axis=2) > 0.51 * 255
        assert not (far & ~scene.mask).any()
        background = (scene.background[scene.mask] @ scenes.LUMA).mean()
        contrast = scene.color @ scenes.LUMA - background
        assert scenes.CONTRAST <= contrast <= scenes.CONTRAST + 1
        assert scene.background.max() <= 128
        assert scene.caption.endswith(f" {scene.label} on a photograph")
        assert scenes.color_name(scene.color) in scene.caption


def test_splits_share_nothing():
    splits = {name: list(scenes.make_scenes(name)) for name in scenes.COPIES}
    assert {name: len(x) for name, x in splits.items()} == {"train": 5748, "test": 720}
    numbers = {name: {x.name.partition("_")[0] for x in s} for name, s in splits.items()}
    assert not numbers["train"] & numbers["test"] and len(numbers["train"]) == 1437
    for name, lowest, highest in (("train", 0, 384), ("test", 384, 640)):
        columns = [(left, left + side) for _, _, left, side in (x.square for x in splits[name])]
        assert min(first for first, _ in columns) >= lowest
        assert max(end for _, end in columns) <= highest
    assert {x.square[0] for x in splits["test"]} == {0, 1}


@pytest.mark.parametrize(
    "color,name",
    [((255, 30, 30), "red"), ((250, 150, 20), "orange"), ((240, 230, 40), "yellow"),
     ((60, 240, 60), "green"), ((60, 230, 240), "cyan"), ((90, 120, 255), "blue"),
     ((190, 100, 255), "purple"), ((255, 110, 210), "pink"), ((200, 210, 205), "white")],
)  # fmt: skip
def test_color_names(color, name):
    assert scenes.color_name(np.array(color)) == name


def test_measured_labels_are_of_one_scene_per_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "load_digits", lambda: itertools.islice(LOADED, 400))
    scenes.write_scenes(tmp_path / "pictures")
    importer.import_images(tmp_path / "pictures", tmp_path / "images", say=lambda _: None)
    splits = small_images.read_splits(tmp_path, "scenes")
    counts = {split: len(labels) for split, (_, labels) in splits.items()}
    assert counts == {"train": 40, "test": 720}
    assert len(tfds_dataset.Split(tmp_path / "images", "train")) == 160
    assert image_sets.SETS["scenes"].labelled == "_0"


LOADED = list(digits.load_digits())


def test_raw_pixels_are_luma_of_blocks():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, :2, :2, 1] = 255  # green
    images[1, 3, 3] = 255  # a white pixel
    features = np.asarray(small_images.raw_pixels(images, block=2))
    np.testing.assert_allclose(features, [[0.587, 0, 0, 0], [0, 0, 0, 0.25]], atol=1e-6)
    np.testing.assert_allclose(small_images.raw_pixels(images)[1, -1], 1, atol=1e-6)
