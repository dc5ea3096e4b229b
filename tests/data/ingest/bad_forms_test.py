"""Bad parquet, WebDataset, zip and TFRecord: one clear line each, before anything is written."""

import builtins
import functools
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpt_jax.data.ingest import discovery, importer, shard_files
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges
from tests.support import image_forms


@functools.cache
def images():
    return image_forms.samples(12)


def cut(path, size=None):
    """Cuts the end off a file."""
    path.write_bytes(path.read_bytes()[: size or -100])


def rewrite(edit):
    """Function that applies edit(table) to a parquet file."""

    def apply(d):
        image_forms.write_parquet(d, images())
        (file,) = d.glob("*.parquet")
        pq.write_table(edit(pq.read_table(file)), file)

    return apply


def add_column(name, column):
    def edit(table):
        info = {"info": {"features": image_forms.features("image", name)}}
        more = table.append_column(name, column(table))
        return more.replace_schema_metadata({"huggingface": json.dumps(info)})

    return edit


def two_labels(table):
    info = {"info": {"features": image_forms.features("image", labels=("label", "coarse"))}}
    more = table.append_column("coarse", table["label"])
    return more.replace_schema_metadata({"huggingface": json.dumps(info)})


def set_labels(values):
    def edit(table):
        return table.set_column(1, "label", values).replace_schema_metadata(table.schema.metadata)

    return edit


def parquet_of(d, **kwargs):
    image_forms.write_parquet(d, images(), 3, **kwargs)


def shards_with(**changes):
    """Function that writes two shards, with other data of the members of the fifth sample; None
    leaves a member out."""

    def write(d):
        image_forms.write_shards(d, images(), 2)
        members = [
            (
                name,
                changes.get(name.rpartition(".")[2], data) if name.startswith("000004") else data,
            )
            for x in images()[:6]
            for name, data in image_forms.members(x)
        ]
        kept = [(name, data) for name, data in members if data is not None]
        image_forms.write_members(d / "00000.tar", kept)

    return write


def zip_with(**changes):
    """Function that writes a zip whose headers have other values."""

    def write(d):
        image_forms.write_zip(d / "x.zip", images(), changes.pop("method", zipfile.ZIP_STORED))
        data = (d / "x.zip").read_bytes()
        if "flags" in changes:
            data = bytearray(data)
            at = data.index(b"PK\x01\x02")
            data[at + 8] |= changes["flags"]
        (d / "x.zip").write_bytes(data)

    return write


def mixed(d):
    image_forms.write_shards(d, images(), 2)
    image_forms.write_parquet(d, images())


def with_stray(write):
    def apply(d):
        write(d)
        (d / "logo.png").write_bytes(images()[0].png)

    return apply


def two_datasets(d):
    image_forms.write_parquet(d / "small", images())
    image_forms.write_parquet(d / "large", images())


def other_classes(d):
    image_forms.write_parquet(d, images(), 2)
    file = d / "train-00001-of-00002.parquet"
    table = pq.read_table(file)
    metadata = table.schema.metadata[b"huggingface"].replace(b"bee", b"bat")
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), file)


def numbered(d):
    for i in range(3):
        image_forms.write_members(d / f"{i:05d}.tar", [(f"{i}.png", images()[i].png)])


def mixed_split_names(d):
    image_forms.write_shards(d, images(), 1, name="train-{}.tar")
    image_forms.write_shards(d, images(), 1, name="more-{}.tar")


NUMBERS = pa.array(range(12))
CASES = {  # (write(directory), columns, message)
    "no image column": (rewrite(lambda t: t.drop(["image"])), {}, "no image column .*caption"),
    "two image columns": (
        rewrite(add_column("mask", lambda t: t["image"])), {}, "image, mask: .*--image_column",
    ),
    "an unknown image": (parquet_of, {"image": "img"}, "--image_column=img: .* label"),
    "an image column of text": (parquet_of, {"image": "caption"}, "'caption' .* no image"),
    "two label columns": (rewrite(two_labels), {}, "label, coarse: .*--label_column=label"),
    "labels that are floats": (
        rewrite(set_labels(pa.array([0.5] * 12))), {}, "'label' .double. is neither",
    ),
    "labels out of range": (
        rewrite(set_labels(NUMBERS)), {}, r"label 4 is out of range: it must be 0 to 3",
    ),
    "an unknown text": (parquet_of, {"keep": ("url",)}, "--keep=url: .* image, label, caption"),
    "a parquet cut off": (
        lambda d: (parquet_of(d), cut(d / "train-00001-of-00003.parquet")),
        {}, "train-00001-of-00003.parquet is not parquet, or is damaged or cut off",
    ),
    "no parquet": (
        lambda d: (d / "x.parquet").write_bytes(b"x" * 500), {}, "x.parquet is not parquet",
    ),
    "an empty parquet": (lambda d: (d / "x.parquet").write_bytes(b""), {}, "x.parquet is not parq"),
    "a missing shard": (
        lambda d: (parquet_of(d), (d / "train-00001-of-00003.parquet").unlink()),
        {}, "train-00001-of-00003.parquet is missing, and 0 more of 3",
    ),
    "other class names": (other_classes, {}, "differ in their columns or class names"),
    "two datasets": (two_datasets, {}, "several folders, .*large, .*small"),
    "an image beside parquet": (with_stray(parquet_of), {}, "parquet files .* and other images"),
    "parquet beside shards": (mixed, {}, "WebDataset shards .* and parquet files"),
    "a shard cut off": (
        lambda d: (image_forms.write_shards(d, images()), cut(d / "00001.tar", 5000)),
        {}, "00001.tar is truncated: it ends at byte 5000",
    ),
    "a sample without image": (
        shards_with(png=None), {}, "sample 000004 in .*00000.tar has no image, only .cls, .json",
    ),
    "a class that is no number": (shards_with(cls=b"bee"), {}, "000004 in .*cls is 'bee', no int"),
    "a class out of range": (shards_with(cls=b"4"), {}, "000004 in .*label 4 is out of range"),
    "a negative class": (shards_with(cls=b"-2"), {}, "000004 in .*label -2 is out of range"),
    "a missing class": (shards_with(cls=None), {}, "000004 in .* has no label"),
    "damaged JSON": (shards_with(json=b"{"), {"label": "label"}, "json of 000004 in .*00000.tar"),
    "JSON that is a list": (shards_with(json=b"[]"), {"label": "label"}, "000004 .*no object"),
    "an unknown key": (shards_with(), {"keep": ("title",)}, "no 'title'; it has caption, url"),
    "an unknown extension": (shards_with(), {"image": "jpg"}, "000000 .* has no .jpg, only .cls"),
    "a key in two shards": (
        lambda d: image_forms.write_shards(d, [*images(), images()[2]], 2),
        {}, "found 1 sample twice, the first is 000002, in .*00000.tar and .*00001.tar",
    ),
    "shards without annotations": (numbered, {}, "is ambiguous: .*000..999.*--split=train"),
    "a shard without a split": (mixed_split_names, {}, "more-0.tar names no split"),
    "an image beside shards": (with_stray(shards_with()), {}, "shards .* and other images"),
    "an encrypted zip": (zip_with(flags=1), {}, "x.zip is encrypted .*password"),
    "another compression": (zip_with(method=zipfile.ZIP_BZIP2), {}, "compressed by bzip2"),
    "a zip cut off": (
        lambda d: cut(image_forms.write_zip(d / "x.zip", images())), {}, "x.zip .*is truncated",
    ),
    "a zip cut in front": (
        lambda d: (d / "x.zip").write_bytes(
            image_forms.write_zip(d / "y.zip", images()).read_bytes()[100:]
        ) and (d / "y.zip").unlink(),
        {}, "x.zip is damaged: its directory",
    ),
    "columns of a zip": (zip_with(), {"keep": ("caption",)}, "has no columns, .*leave out --keep"),
    "a TFRecord cut off": (
        lambda d: cut(next(image_forms.write_tfrecord(d, images()).glob("*00001-of*"))),
        {}, "00001-of-00002 is cut off within record",
    ),
    "a TFRecord without metadata": (
        lambda d: (image_forms.write_tfrecord(d, images()) / "dataset_info.json").unlink(),
        {}, "it has no dataset_info.json",
    ),
    "a missing record": (
        lambda d: next(image_forms.write_tfrecord(d, images()).glob("*00000-of*")).write_bytes(b""),
        {}, "has 0 records, its metadata say 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path):
    write, columns, message = CASES[case]
    (tmp_path / "src").mkdir()
    write(tmp_path / "src")
    with pytest.raises(UserError, match=message) as error:
        importer.import_images(
            tmp_path / "src", tmp_path / "out", columns=Columns(**columns), say=lambda _: None
        )
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_patterns(tmp_path):
    image_forms.write_shards(tmp_path, images(), 3)
    for pattern, message in (
        ("{00003..00009}.tar", "matches no file; the first would be .*00003.tar"),
        ("{00001..00004}.tar", "00003.tar and 1 other files of .* are missing"),
        ("{00002..00001}.tar", "counts down"),
        ("{00002}.tar", "neither a range"),
        ("{0..9999999}.tar", "more than 1000000 files"),
        ("{00000.tar,classnames.txt}", "a pattern must stand for"),
    ):
        with pytest.raises(UserError, match=message):
            discovery.discover(f"{tmp_path}/{pattern}")
    for pattern, expected in (
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
    ):
        assert list(shard_files._expand(pattern, pattern)) == expected


def test_pyarrow_that_is_not_installed(tmp_path, monkeypatch):
    parquet_of(tmp_path)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'dgpt_jax\[parquet\]'"):
        discovery.discover(tmp_path)


@pytest.mark.parametrize("keep", ["id", "a,a", "a b", "../x"])
def test_names_of_text_columns(keep):
    with pytest.raises(UserError, match="--keep="):
        Columns.parse(None, None, keep)


DAMAGE = {  # single images that cannot be read: skipped, with the reason
    "zip": (lambda d: image_forms.write_zip(d / "x.zip", images()), "its CRC32 differs"),
    "deflated": (
        lambda d: image_forms.write_zip(d / "x.zip", images(), zipfile.ZIP_DEFLATED),
        "damaged in the zip",
    ),
}


@pytest.mark.parametrize("form", DAMAGE)
def test_a_damaged_member_of_a_zip(form, tmp_path):
    write, reason = DAMAGE[form]
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 70] ^= 0xFF
    path.write_bytes(data)
    report = importer.import_images(path, tmp_path / "out", say=lambda _: None)
    assert report.examples == {"train": 11} and reason in report.broken[0]


def test_a_null_image(tmp_path):
    def edit(table):
        rows = table.to_pylist()
        rows[3]["image"] = None
        rows[4]["image"]["bytes"] = None
        rows[5]["caption"] = None
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewrite(edit)(tmp_path / "src")
    columns = Columns(keep=("caption",))
    report = importer.import_images(
        tmp_path / "src", tmp_path / "out", columns=columns, say=lambda _: None
    )
    name = "train-00000-of-00001.parquet"
    assert report.broken == [f"{name}:{i}: the row has no bytes of an image" for i in (3, 4)]
    assert report.examples == {"train": 10} and report.empty_texts == {"caption": 1}


def test_a_source_that_changes_while_it_is_imported(tmp_path):
    """A shard of the same length with another footer; a record with a wrong checksum."""
    parquet_of(tmp_path / "src")
    rows = discovery.discover(tmp_path / "src").splits["train"]
    parquet_of(tmp_path / "src", rows=1)
    with pytest.raises(UserError, match="has changed since it was listed"):
        next(iter(rows))
    file = next(image_forms.write_tfrecord(tmp_path / "rec", images()).glob("*00000-of*"))
    (entry, *_) = discovery.discover(tmp_path / "rec").splits["train"]
    data = bytearray(file.read_bytes())
    data[entry.offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="record 0 is damaged: its CRC32C differs"):
        entry.read()


GOLDEN = (  # written by TensorFlow 2.21: records b"" and b"abc"
    "AAAAAAAAAAApA5gH2OqCogMAAAAAAAAAsJlJDmFiY25X8SE="
)


def test_the_framing_of_tensorflow(tmp_path):
    import base64

    from dgpt_jax.data.ingest import tfrecord_index

    path = tmp_path / "x"
    path.write_bytes(base64.b64decode(GOLDEN))
    ranges = tfrecord_index._ranges(bytes(path)).tolist()
    assert [byte_ranges.read(str(path), *r) for r in ranges] == [b"", b"abc"]
    assert image_forms.framed(b"") + image_forms.framed(b"abc") == path.read_bytes()
