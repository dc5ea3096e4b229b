"""Bytes that are stored: records, pictures, shards, tars and metadata, damaged in any way."""

import contextlib
import functools
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from dgpt_jax import bad_records, records, shards, tars, token_store, views
from dgpt_jax.bad_records import BadRecord
from dgpt_jax.schema import UserError
from tests import data, stores

RECORDS = 6


@functools.cache
def store(directory: Path) -> Path:
    """A store without a manifest, so that shards of another size are opened."""
    info = stores.store_info("float16", grid=(2, 2), width=8)
    path = stores.write(directory / "tokens", [RECORDS], info=info)
    (path / shards.MANIFEST).unlink()
    return path


@functools.cache
def opened(directory: Path):
    """(split, its records, the shard's path and bytes)."""
    path = store(directory)
    split = records.Split(path, "view000")
    shard = next(path.glob("tokens-*"))
    return split, [split.raw(i) for i in range(RECORDS)], shard, shard.read_bytes()


@st.composite
def mutated(draw, content: bytes, places=None):
    """Bytes set, cut off, put in, taken out, repeated; `places`: where, by default anywhere."""
    found = bytearray(content)
    place = st.integers(0, len(content)) if places is None else st.sampled_from(places)
    for _ in range(draw(st.integers(1, 4))):
        where, kind = min(draw(place), len(found)), draw(st.integers(0, 7))
        if kind < 4:
            found[where : where + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 4:
            del found[where:]
        elif kind == 5:
            found[where:where] = draw(st.binary(max_size=20))
        elif kind == 6:
            del found[where : where + draw(st.integers(1, 300))]
        else:
            found[where:where] = found[where : where + draw(st.integers(1, 50))]
    return bytes(found)


def read(split, content: bytes):
    """A record with these bytes, as training reads it: right in form, or a BadRecord."""
    split.raw = lambda _: content
    try:
        record = split[3]
        image = bad_records.picture(split, 3, record)
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
def picture(kind: str) -> bytes:
    return views.encode_picture(data.smooth_image(np.random.default_rng(0), 24, 16), kind)


def mutated_image(draw, _):
    content = picture(draw(st.sampled_from(sorted(views.ENCODINGS))))
    with contextlib.suppress(ValueError):
        image = views.decode_picture(draw(mutated(content)))
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


@functools.cache
def tar(form: int) -> tuple[bytes, list[int]]:
    """A tar with a long name and a link, and the places of its headers."""
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
    """Members lie within the archive, in order and with clean names, or it is refused."""
    content, places = tar(draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    content = draw(mutated(content, places))
    path = directory / "x.tar"
    path.write_bytes(content)
    last = 0
    with path.open("rb") as file, contextlib.suppress(UserError):
        for name, offset, size in tars.members(file.fileno(), os.fspath(path)):
            assert last <= offset <= offset + size <= len(content)
            assert not name.startswith((b"/", b"../")) and b"/../" not in name
            last = offset + size


def mutated_metadata(draw, directory):
    """Opened, or refused with a line."""
    path = store(directory)
    name = draw(st.sampled_from(["token_store.json", "dataset_info.json", "features.json"]))
    whole = (path / name).read_bytes()
    try:
        (path / name).write_bytes(draw(mutated(whole)))
        with contextlib.suppress(UserError):
            found = records.Opened(path)
            token_store.refuse_others(path, found.builder.info.features)
            records.Split(path, "view000", found)
    finally:
        (path / name).write_bytes(whole)


def mutated_shard(draw, directory):
    """What is read of a damaged file is what was written, or an error."""
    _, raw, shard, whole = opened(directory)
    try:
        places = np.flatnonzero(np.frombuffer(whole, np.uint8)).tolist()
        shard.write_bytes(draw(mutated(whole, places)))
        try:
            split = records.Split(store(directory), "view000")
        except UserError:
            return
        for index in range(RECORDS):
            with contextlib.suppress(BadRecord):
                assert split.raw(index) == raw[index]
    finally:
        shard.write_bytes(whole)
