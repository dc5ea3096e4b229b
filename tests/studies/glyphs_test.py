"""The set of glyphs: its counts, its labels, and that every font has every character."""

import digits
import glyphs
import numpy as np

from dgpt_jax import images, records


def test_every_font_has_every_character():
    """None is empty, none is the box of a missing character, none is cut off at the border."""
    assert len(glyphs.CLASSES) == len({name.lower() for name in glyphs.CLASSES.values()}) == 62
    assert len(set(glyphs.TRAIN + glyphs.TEST)) == 21
    rng = np.random.default_rng(0)
    for font in glyphs.TRAIN + glyphs.TEST:
        drawn = {}
        for character in glyphs.CLASSES:
            picture = np.asarray(glyphs.render(character, font, 32, rng))
            assert picture.shape == (32, 32) and picture.max() > 150
            border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert border.max() < 150, (font, character)
            still = glyphs.render(character, font, 32, np.random.default_rng(1))
            drawn.setdefault(still.tobytes(), []).append(character)
        assert all(len(same) == 1 for same in drawn.values()), (font, drawn.values())


def test_they_are_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        glyphs, "SPLITS", {"train": (glyphs.TRAIN[:2], 2), "test": (("cmss10",), 1)}
    )
    glyphs.write_glyphs(tmp_path / "a", 64, seed=3)
    report = images.import_images(tmp_path / "a", tmp_path / "glyphs", say=lambda _: None)
    assert report.examples == {"test": 62, "train": 248} and not report.broken
    assert report.classes == sorted(glyphs.CLASSES.values())
    pictures, labels = digits.read_pictures(tmp_path / "glyphs", "train")
    assert pictures.shape == (248, 64, 64, 3) and np.bincount(labels).tolist() == [4] * 62
    source = records.Split(tmp_path / "glyphs", "train")
    names = source.label.names
    assert all(source[i]["id"].startswith(f"{names[labels[i]]}/") for i in range(0, 248, 17))
    # By seed, the same and others.
    for seed, folder in ((3, "b"), (4, "c")):
        glyphs.write_glyphs(tmp_path / folder, 64, seed=seed)
    files = [
        (tmp_path / folder / "test/upper_Q/cmss10_0.jpg").read_bytes() for folder in ("a", "b", "c")
    ]
    assert files[0] == files[1] != files[2]


def test_held_out_fonts_are_held_out():
    assert not set(glyphs.TRAIN) & set(glyphs.TEST)
    counts = {split: 62 * len(fonts) * each for split, (fonts, each) in glyphs.SPLITS.items()}
    assert counts == {"train": 5952, "test": 1240}
