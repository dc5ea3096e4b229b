"""Properties of reading damaged records, images, shards, tars and metadata."""

import contextlib
import functools
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from dgpt_jax.data import bad_records, image_ops, token_store
from dgpt_jax.data.ingest import tar_index
from dgpt_jax.errors import BadRecord, UserError
from dgpt_jax.storage import array_record_shards, byte_ranges, tfds_dataset
from tests.support import data, stores

RECORDS = 6


@functools.cache
def store(directory: Path) -> Path:
    """A store without a manifest, so that shards of a wrong size are opened."""
    info = stores.store_info("float16", grid=(2, 2), width=8)
    path = stores.write(directory / "tokens", [RECORDS], info=info)
    (path / array_record_shards.MANIFEST).unlink()
    return path


@functools.cache
def opened(directory: Path):
    """(split, its records, path and content of the shard)."""
    path = store(directory)
    split = tfds_dataset.Split(path, "view000")
    shard = next(path.glob("tokens-*"))
    return split, [split.raw(i) for i in range(RECORDS)], shard, shard.read_bytes()


@st.composite
def mutated(draw, content: bytes, offsets=None):
    """Content with bytes set, cut off, inserted, removed or repeated, anywhere or at `offsets`."""
    mutant = bytearray(content)
    offset = st.integers(0, len(content)) if offsets is None else st.sampled_from(offsets)
    for _ in range(draw(st.integers(1, 4))):
        at, kind = min(draw(offset), len(mutant)), draw(st.integers(0, 7))
        if kind < 4:
            mutant[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 4:
            del mutant[at:]
        elif kind == 5:
            mutant[at:at] = draw(st.binary(max_size=20))
        elif kind == 6:
            del mutant[at : at + draw(st.integers(1, 300))]
        else:
            mutant[at:at] = mutant[at : at + draw(st.integers(1, 50))]
    return bytes(mutant)


def read(split, content: bytes):
    """Reads a record with this content as training does: it is well-formed, or a BadRecord."""
    split.raw = lambda _: content
    try:
        record = split[3]
        image = bad_records.decode_image(split, 3, record)
    except BadRecord as e:
        assert "example 3 (" in str(e) and "\n" not in str(e)
        return
    finally:
        del split.raw
    assert record["tokens"].shape == (5, 8) and record["tokens"].dtype == np.float16
    assert np.isfinite(record["tokens"]).all() and isinstance(record["id"], str)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.size


def random_bytes_as_record(draw, directory):
    read(opened(directory)[0], draw(st.binary(max_size=400)))


def mutated_record(draw, directory):
    split, raw, *_ = opened(directory)
    read(split, draw(mutated(raw[draw(st.integers(0, RECORDS - 1))])))


@functools.cache
def encoded_image(kind: str) -> bytes:
    return image_ops.encode_image(data.smooth_image(np.random.default_rng(0), 24, 16), kind)


def mutated_image(draw, _):
    content = encoded_image(draw(st.sampled_from(sorted(image_ops.ENCODINGS))))
    with contextlib.suppress(ValueError):
        image = image_ops.decode_image(draw(mutated(content)))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


@functools.cache
def tar(form: int) -> tuple[bytes, list[int]]:
    """A tar with a long name and a link, and the offsets of its header bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, size in (("a/x.jpg", 700), ("b/" + "y" * 120 + ".png", 20), ("z.jpg", 0)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, 1.5
            archive.addfile(member, io.BytesIO(b"x" * size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../x"
        archive.addfile(link)
    content = buffer.getvalue()[: 12 * 512]
    return content, [i for i, byte in enumerate(content) if byte and byte != ord("x")]


def mutated_tar(draw, directory):
    """Members lie within the archive, in order, with clean names; or a UserError."""
    content, offsets = tar(draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    content = draw(mutated(content, offsets))
    path = directory / "x.tar"
    path.write_bytes(content)
    last = 0
    with byte_ranges.RangeReader(str(path)) as file, contextlib.suppress(UserError):
        for name, offset, size in tar_index.members(file, os.fspath(path)):
            assert last <= offset <= offset + size <= len(content)
            assert not name.startswith((b"/", b"../")) and b"/../" not in name
            last = offset + size


def mutated_metadata(draw, directory):
    """The store opens, or a UserError."""
    path = store(directory)
    name = draw(st.sampled_from(["token_store.json", "dataset_info.json", "features.json"]))
    content = (path / name).read_bytes()
    try:
        (path / name).write_bytes(draw(mutated(content)))
        with contextlib.suppress(UserError):
            dataset = tfds_dataset.Opened(path)
            token_store.check_features(path, dataset.builder.info.features)
            tfds_dataset.Split(path, "view000", dataset)
    finally:
        (path / name).write_bytes(content)


def mutated_shard(draw, directory):
    """Records of a damaged shard are as written, or an error."""
    _, raw, shard, content = opened(directory)
    try:
        offsets = np.flatnonzero(np.frombuffer(content, np.uint8)).tolist()
        shard.write_bytes(draw(mutated(content, offsets)))
        try:
            split = tfds_dataset.Split(store(directory), "view000")
        except UserError:
            return
        for index in range(RECORDS):
            with contextlib.suppress(BadRecord):
                assert split.raw(index) == raw[index]
    finally:
        shard.write_bytes(content)
