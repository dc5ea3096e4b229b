"""Parquet, WebDataset, TFRecord and zip give the same dataset as the folder of the same images."""

import functools
import json
import signal
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpt_jax.data import image_ops
from dgpt_jax.data.ingest import discovery, importer
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support import image_forms, processes
from tests.support.image_forms import CLASSES

COUNT = 500


@functools.cache
def images():
    return image_forms.samples(COUNT)


def import_all(src, out, **kwargs):
    return importer.import_images(src, out, say=lambda _: None, **kwargs)


def contents(out, split="train") -> dict[str, tuple]:
    """{key: (label, pixels, texts)} of a split; ids are CLASS/KEY.png, KEY.png, KEY or FILE:ROW."""
    source = tfds_dataset.Split(out, split)
    result = {}
    for x in source:
        texts = {k: v.decode() for k, v in x.items() if k not in ("id", "image", "label")}
        pixels = image_ops.decode_image(x["image"]).tobytes()
        result[x["id"]] = (CLASSES[x["label"]], pixels, texts)
    assert len(result) == len(source)
    return result


def key_of(identifier: str) -> str:
    return identifier.rpartition("/")[2].removesuffix(".png")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    import_all(image_forms.write_folder(root / "src", images()), root / "out")
    return {key_of(name): value for name, value in contents(root / "out").items()}


def zip64(path, count):
    """Writes a zip as if it had more than 65,535 members."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
        patch.setattr(zipfile, "ZIP64_LIMIT", 5)
        image_forms.write_zip(path, images()[:count])
    return path


FORMS = {  # writes the images below a directory, and returns the source
    "zip, stored": lambda d: image_forms.write_zip(d / "x.zip", images()),
    "zip, deflated": lambda d: image_forms.write_zip(d / "x.zip", images(), zipfile.ZIP_DEFLATED),
    "zip, piped": lambda d: image_forms.write_zip(
        d / "x.zip", images(), zipfile.ZIP_DEFLATED, stream=True
    ),
    "zip, zip64": lambda d: zip64(d / "x.zip", COUNT),
    "zip of a split": lambda d: image_forms.write_zip(d / "x/train.zip", images()).parent,
    "parquet": lambda d: image_forms.write_parquet(d / "data", images(), 3).parent,
    "parquet, one file": lambda d: (
        image_forms.write_parquet(d, images(), rows=COUNT) / "train-00000-of-00001.parquet"
    ),
    "parquet, pattern": lambda d: (
        f"{image_forms.write_parquet(d, images(), 3)}/train-{{00000..00002}}-of-00003.parquet"
    ),
    "webdataset": lambda d: image_forms.write_shards(d, images()),
    "webdataset, pattern": lambda d: (
        f"{image_forms.write_shards(d, images(), 11)}/{{00000..00010}}.tar"
    ),
    "tfrecord": lambda d: image_forms.write_tfrecord(d / "my_set", images()),
    "webdataset, one shard": lambda d: image_forms.write_shards(d, images(), 1) / "00000.tar",
}  # fmt: skip
WITH_TEXT = [form for form in FORMS if not form.startswith("zip")]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_dataset_of_the_folder(form, tmp_path, expected):
    (tmp_path / "src").mkdir()
    source = FORMS[form](tmp_path / "src")
    report = import_all(source, tmp_path / "out", shard_size=64)
    assert report.examples == {"train": COUNT} and report.classes == list(CLASSES)
    assert not report.broken
    stored = contents(tmp_path / "out")
    assert {key_of(name): value for name, value in stored.items()} == expected


@pytest.mark.parametrize("form", WITH_TEXT)
def test_captions(form, tmp_path):
    (tmp_path / "src").mkdir()
    source = FORMS[form](tmp_path / "src")
    columns = Columns.parse(None, None, "caption")
    import_all(source, tmp_path / "out", columns=columns, shard_size=64)
    captions = {key_of(name): x[2] for name, x in contents(tmp_path / "out").items()}
    assert captions == {x.key: {"caption": x.caption} for x in images()}


def test_keys_of_json(tmp_path):
    """A label and texts of .json; a value that is no string is stored as JSON, null as ""."""
    few = [x for x in images()[:8]]
    src = image_forms.write_shards(tmp_path / "src", few, 2)
    columns = Columns.parse("png", "label", "url,label_again")
    members = [
        (name, data.replace(b'{"caption"', b'{"label_again": [%d, 1.5], "caption"' % i))
        for i, x in enumerate(few)
        for name, data in image_forms.members(x)
    ]
    image_forms.write_members(tmp_path / "src/00000.tar", members[:16])
    image_forms.write_members(tmp_path / "src/00001.tar", members[16:])
    report = import_all(src, tmp_path / "out", columns=columns)
    assert report.classes == list(CLASSES) and not report.empty_texts
    for i, (x, (label, _, texts)) in enumerate(zip(few, contents(tmp_path / "out").values())):
        assert label == CLASSES[x.label]
        assert texts == {"url": f"http://x/{x.key}", "label_again": f"[{i}, 1.5]"}


@pytest.mark.parametrize("path,ids", [("{key}.png", "{key}.png"), ("same.png", "{file}:{row}")])
def test_ids_of_parquet(path, ids, tmp_path):
    """The path where all are distinct, else file and row."""
    src = image_forms.write_parquet(tmp_path / "src", images()[:20], 2, path=path, rows=3)
    import_all(src, tmp_path / "out", shard_size=7)
    names = [f"train-{i:05d}-of-00002.parquet" for i in range(2)]
    assert list(contents(tmp_path / "out")) == [
        ids.format(key=x.key, file=names[i // 10], row=i % 10) for i, x in enumerate(images()[:20])
    ]


def test_parts_of_parquet(tmp_path):
    """Any part of a split, in any order and across files: as a resumed import reads them."""
    image_forms.write_parquet(tmp_path, images()[:60], 2, rows=8)
    rows = discovery.discover(tmp_path).splits["train"]
    for start, stop in ((21, 50), (50, 60), (0, 3), (3, 35), (59, 60)):
        part = list(rows.take(slice(start, stop)))
        assert [x.id for x in part] == [f"{x.key}.png" for x in images()[start:stop]]
        assert [x.read() for x in part] == [x.png for x in images()[start:stop]]


def test_splits_of_shards(tmp_path):
    """By words in the names of files or folders."""
    few = images()[:10]
    for form in ("parquet", "webdataset", "folders"):
        src = tmp_path / form
        for split, part in (("train", few[:6]), ("validation", few[6:])):
            if form == "parquet":
                image_forms.write_parquet(src, part, split=split)
            elif form == "webdataset":
                image_forms.write_shards(src, part, 2, name=f"imagenet1k-{split}-{{:04d}}.tar")
            else:
                image_forms.write_shards(src / split, part, 2)
        (src / "classnames.txt").write_text("\n".join(CLASSES))
        report = import_all(src, tmp_path / f"{form}.out")
        assert report.examples == {"train": 6, "validation": 4}
        assert report.classes == list(CLASSES)


README = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': ant
          '2': cat, big
          '10': eel
          '1': bee
          '3': dog
  - name: caption
    dtype: string
---
# Insects
"""
BESIDE = {  # file beside the parquet → class names
    "README.md": (README, ["ant", "bee", "cat, big", "dog", "eel"]),
    "dataset_infos.json": (
        json.dumps({"default": {"features": image_forms.features("image")}}), list(CLASSES),
    ),
    "": ("", ["0", "1", "2", "3"]),
}  # fmt: skip


@pytest.mark.parametrize("file", BESIDE)
def test_class_names_beside_parquet(file, tmp_path):
    """Without metadata in the parquet files; if there are none, the numbers."""
    content, names = BESIDE[file]
    image_forms.write_parquet(tmp_path / "src/data", images()[:30], 2, metadata=False)
    if file:
        (tmp_path / "src" / file).write_text(content)
    discovered = discovery.discover(tmp_path / "src")
    assert discovered.classes == names
    stored = [x.label for x in discovered.splits["train"]]
    assert stored == [x.label for x in images()[:30]]


def test_labels_that_are_names(tmp_path):
    """Sorted, as class folders are."""
    table = image_forms.table(images()[:30], metadata=False)
    names = [f"class {9 - x.label}" for x in images()[:30]]
    pq.write_table(table.set_column(1, "label", pa.array(names)), tmp_path / "x.parquet")
    discovered = discovery.discover(tmp_path / "x.parquet")
    assert discovered.classes == sorted(set(names))
    assert [discovered.classes[x.label] for x in discovered.splits["train"]] == names


def test_unlabelled_rows(tmp_path):
    """A test split whose labels are -1; --label_column= imports none."""
    few = [image_forms.Sample(x.key, -1, x.caption, x.png) for x in images()[:4]]
    image_forms.write_parquet(tmp_path / "src", images()[4:8])
    image_forms.write_parquet(tmp_path / "src", few, split="test")
    assert import_all(tmp_path / "src", tmp_path / "out").classes == list(CLASSES)
    assert [x["label"] for x in tfds_dataset.Split(tmp_path / "out", "test")] == [-1] * 4
    columns = Columns.parse(None, "", None)
    assert import_all(tmp_path / "src", tmp_path / "none", columns=columns).classes == []


def test_digests_of_sources(tmp_path):
    """They change with any label, size, id or text column, and with nothing else."""
    for write in (image_forms.write_parquet, image_forms.write_shards):
        root = tmp_path / write.__name__
        first, again = (write(root / name, images()[:9]) for name in "ab")
        digest = discovery.discover(first).digest()
        assert discovery.discover(again).digest() == digest
        changed = images()[:8] + [image_forms.Sample("x", 0, "", images()[8].png)]
        assert discovery.discover(write(root / "c", changed)).digest() != digest


@pytest.mark.parametrize("form", ["parquet", "webdataset", "tfrecord", "zip, deflated"])
def test_a_killed_import_continues(form, tmp_path):
    """After kill -9, on another number of threads: the same bytes as in one go."""
    (tmp_path / "src").mkdir()
    source, out, whole = FORMS[form](tmp_path / "src"), tmp_path / "a/out", tmp_path / "b/out"
    keep = [] if form.startswith("zip") else ["--keep=caption"]
    words = ["tools/import_images.py", source, f"--out={out}", "--shard_size=7", *keep]
    process = processes.start([*words, "--threads=1"])
    while len(list(out.glob(".*.receipt"))) < 9 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    (output,) = processes.outputs_of([process], timeout=60)
    assert process.returncode == -9, output
    done = len(array_record_shards.shard_infos(out))
    assert 9 <= done < COUNT // 7
    columns = Columns.parse(None, None, "caption" if keep else None)
    for target, threads in ((out, 3), (whole, 2)):
        import_all(source, target, columns=columns, shard_size=7, threads=threads)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
