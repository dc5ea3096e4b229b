"""The glyph set: fonts, counts, labels."""

import numpy as np

from dgpt_jax.data.ingest import importer
from dgpt_jax.examples import digits, glyphs
from dgpt_jax.storage import tfds_dataset


def test_every_font_has_every_character():
    """No glyph is empty, cropped, or the box of a missing character."""
    assert len(glyphs.CLASSES) == len({name.lower() for name in glyphs.CLASSES.values()}) == 62
    assert len(set(glyphs.TRAIN + glyphs.TEST)) == 21
    rng = np.random.default_rng(0)
    for font in glyphs.TRAIN + glyphs.TEST:
        characters = {}
        for character in glyphs.CLASSES:
            image = np.asarray(glyphs.render(character, font, 32, rng))
            assert image.shape == (32, 32) and image.max() > 150
            border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert border.max() < 150, (font, character)
            still = glyphs.render(character, font, 32, np.random.default_rng(1))
            characters.setdefault(still.tobytes(), []).append(character)
        assert all(len(same) == 1 for same in characters.values()), (font, characters.values())


def test_import(tmp_path, monkeypatch):
    monkeypatch.setattr(
        glyphs, "SPLITS", {"train": (glyphs.TRAIN[:2], 2), "test": (("cmss10",), 1)}
    )
    glyphs.write_glyphs(tmp_path / "a", 64, seed=3)
    report = importer.import_images(tmp_path / "a", tmp_path / "glyphs", say=lambda _: None)
    assert report.examples == {"test": 62, "train": 248} and not report.broken
    assert report.classes == sorted(glyphs.CLASSES.values())
    images, labels = digits.read_images(tmp_path / "glyphs", "train")
    assert images.shape == (248, 64, 64, 3) and np.bincount(labels).tolist() == [4] * 62
    source = tfds_dataset.Split(tmp_path / "glyphs", "train")
    names = source.label.names
    assert all(source[i]["id"].startswith(f"{names[labels[i]]}/") for i in range(0, 248, 17))
    for seed, folder in ((3, "b"), (4, "c")):
        glyphs.write_glyphs(tmp_path / folder, 64, seed=seed)
    files = [
        (tmp_path / folder / "test/upper_Q/cmss10_0.jpg").read_bytes() for folder in ("a", "b", "c")
    ]
    assert files[0] == files[1] != files[2]


def test_splits_share_no_font():
    assert not set(glyphs.TRAIN) & set(glyphs.TEST)
    counts = {split: 62 * len(fonts) * each for split, (fonts, each) in glyphs.SPLITS.items()}
    assert counts == {"train": 5952, "test": 1240}
