"""Importing folders of images as users have them."""

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import images, records, views
from dgpt_jax.schema import UserError
from tests.data import smooth_image, write_folder


def import_all(src, out, **kwargs):
    return images.import_folder(src, out, say=lambda _: None, **kwargs)


def pictures(out, split="train"):
    source = records.Split(out, split)
    return {source[i]["id"]: views.decode_picture(source[i]["image"]) for i in range(len(source))}


@pytest.fixture
def odd_folder(tmp_path):
    """One of each kind, and one broken file; returns the folder and the upright picture."""
    picture = smooth_image(np.random.default_rng(0), 20, 30)
    image = Image.fromarray(picture)
    folder = tmp_path / "src"
    (folder / "deeper").mkdir(parents=True)
    image.save(folder / "plain.png")
    image.save(folder / "plain.jpg", quality=95)
    image.convert("L").save(folder / "grey.jpg", quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.save(folder / "deeper" / "UPPER.JPEG", quality=95)
    image.save(folder / "bitmap.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned, to be shown after a turn by 90° clockwise
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "exif.jpg", quality=95, exif=exif)
    data = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder, picture


def test_odd_files(odd_folder, tmp_path):
    folder, picture = odd_folder
    report = import_all(folder, tmp_path / "out")
    assert report.examples == {"train": 7} and report.classes == []
    assert sorted(line.split(":")[0].rsplit("/")[-1] for line in report.broken) == [
        "text.png",
        "truncated.jpg",
    ]
    found = pictures(tmp_path / "out")
    assert found["plain.png"].tolist() == picture.tolist() == found["bitmap.bmp"].tolist()
    # Bytes of an upright JPEG are kept as they are.
    source = records.Split(tmp_path / "out", "train")
    kept = {source[i]["id"]: source[i]["image"] for i in range(len(source))}
    assert kept["plain.jpg"] == (folder / "plain.jpg").read_bytes()
    for name in ("plain.jpg", "deeper/UPPER.JPEG", "exif.jpg", "cmyk.jpg"):
        assert found[name].shape == picture.shape, name
        error = np.abs(found[name].astype(int) - picture).mean()
        assert error < 6, (name, error)
    grey = np.asarray(Image.fromarray(picture).convert("L"), int)
    assert np.abs(found["grey.jpg"].astype(int) - grey[..., None]).mean() < 3


def test_class_folders_and_split_folders(tmp_path):
    write_folder(tmp_path / "src", 3, split="train")
    write_folder(tmp_path / "src", 2, split="test", classes=("a", "b"))
    report = import_all(tmp_path / "src", tmp_path / "out")
    assert report.examples == {"test": 4, "train": 6} and report.classes == ["a", "b"]
    source = records.Split(tmp_path / "out", "test")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert source[3]["id"] == "test/b/001.png"


def test_shards_hold_the_files_in_order(tmp_path):
    write_folder(tmp_path / "src", 5)
    import_all(tmp_path / "src", tmp_path / "out", shard_size=3, threads=4)
    assert len(list((tmp_path / "out").glob("*array_record*"))) == 4
    source = records.Split(tmp_path / "out", "train")
    assert [source[i]["id"] for i in (0, 4, 5, 9)] == [
        "a/000.png", "a/004.png", "b/000.png", "b/004.png",
    ]  # fmt: skip


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        import_all(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        import_all(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "sub" / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match="none of the 1 images"):
        import_all(tmp_path / "empty", tmp_path / "out2")
    write_folder(tmp_path / "src", 2)
    import_all(tmp_path / "src", tmp_path / "done")
    with pytest.raises(UserError, match="already holds a dataset"):
        import_all(tmp_path / "src", tmp_path / "done")
