"""Samples of one WebDataset shard: the members of a tar with one key, an image and its annotations.

A key ends at the first dot of a file name, as in the library webdataset.
"""

import json
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from dgpt_jax.data.ingest import tar_index
from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.data.ingest.names import hidden_above, is_image
from dgpt_jax.data.ingest.tar_links import Member
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage.byte_ranges import RangeReader

ANNOTATIONS = ("cls", "json", "txt")
FIRST = 64  # members among which the first image must be

Range = tuple[int, int]  # offset, size
# Key, image, label, (txt, json); size 0 if there is none.
Scanned = tuple[bytes, Range, object, tuple[Range, Range]]


@dataclass
class Sample:
    """Members of one key, {extension: byte range}."""

    key: bytes
    members: dict[str, Range] = field(default_factory=dict)


def split_key(name: bytes) -> tuple[bytes, str]:
    """Returns (key, extension in lower case) of a member's path."""
    folder, base = posixpath.split(name)
    key, _, extension = base.partition(b".")
    return posixpath.join(folder, key), text(extension).lower()


def _is_image(extension: str) -> bool:
    return is_image(b"x." + extension.encode())


def _samples(members: Iterable[Member]) -> Iterator[Sample]:
    """Groups consecutive members by key; without hidden files and folders."""
    sample = Sample(b"")
    for name, offset, size in members:
        folder, base = posixpath.split(name)
        if base.startswith(b".") or hidden_above(folder):
            continue
        key, extension = split_key(name)
        if key != sample.key or extension in sample.members:
            if sample.members:
                yield sample
            sample = Sample(key)
        sample.members[extension] = offset, size
    if sample.members:
        yield sample


def is_shard(file: RangeReader) -> bool:
    """True if the first image of a tar has an annotation beside it."""
    for sample in _samples(islice(tar_index.members(file, file.path), FIRST)):
        if any(map(_is_image, sample.members)):
            return not sample.members.keys().isdisjoint(ANNOTATIONS)
    return False


class SampleCheck:
    """Raises UserError if an image of a tar that is no shard has an annotation beside it."""

    def __init__(self, title: str):
        self._title, self._key = title, b""
        self._names: dict[bool, bytes] = {}

    def add(self, name: bytes):
        """Checks the next member."""
        key, extension = split_key(name)
        is_annotation = extension in ANNOTATIONS
        if posixpath.basename(name).startswith(b".") or not (is_annotation or _is_image(extension)):
            return
        self._names = self._names if key == self._key else {}
        self._key, self._names[is_annotation] = key, name
        if len(self._names) == 2:
            raise UserError(
                f"{self._title} is ambiguous: {text(self._names[False])} next to "
                f"{text(self._names[True])} is a sample of a WebDataset, but the first image has "
                f"no annotation, or the tar is in another: repack it, or unpack it and set --labels"
            )


def scan(path: bytes, columns: Columns) -> tuple[list[Scanned], list[str]]:
    """Returns the samples of a shard, and notes. Raises UserError."""
    samples: list[Scanned] = []
    notes: list[str] = []
    try:
        with RangeReader(path) as file:
            for sample in _samples(tar_index.members(file, file.path, note=notes.append)):
                where = f"{text(sample.key)} in {file.path}"
                image = _image_of(sample, columns, where)
                txt, json = (sample.members.get(name, (0, 0)) for name in ("txt", "json"))
                label = _label_of(file, sample, columns, where)
                samples.append((sample.key, image, label, (txt, json)))
    except OSError as e:
        raise UserError(f"{text(path)}: {e.strerror}") from e
    return samples, notes


def _image_of(sample: Sample, columns: Columns, where: str) -> Range:
    """Returns the byte range of a sample's image. Raises UserError."""
    if columns.image is not None:
        images = [columns.image] if columns.image in sample.members else []
    else:
        images = [extension for extension in sample.members if _is_image(extension)]
    if not images:
        kind = f".{columns.image}" if columns.image else "image"
        raise UserError(
            f"sample {where} has no {kind}, only {', '.join('.' + e for e in sample.members)}: "
            f"remove it, or repack the shard"
        )
    if len(images) > 1:
        raise UserError(
            f"sample {where} has several images, {', '.join('.' + e for e in images)}: choose one "
            f"with --image_column={images[0]}"
        )
    return sample.members[images[0]]


def _label_of(file: RangeReader, sample: Sample, columns: Columns, where: str) -> object:
    """Returns the label: the integer of .cls, or the value of a key of .json. Raises UserError."""
    name = "cls" if columns.label is None else columns.label
    if name == "cls" and "cls" in sample.members:
        content = file.read_at(*sample.members["cls"]).decode("utf-8", "replace").strip()
        try:
            return int(content)
        except ValueError:
            raise UserError(f"{where}: its .cls is {content[:40]!r}, no integer") from None
    if name not in ("", "cls") and "json" in sample.members:
        data = file.read_at(*sample.members["json"])
        return parse_json(data, text(sample.key), file.path).get(name)
    return None


def parse_json(data: bytes, key: str, file: str | bytes) -> dict:
    """Parses the object in a .json. Raises UserError."""
    try:
        content = json.loads(data)
        if isinstance(content, dict):
            return content
        reason = "no object"
    except ValueError as e:
        reason = one_line(e)
    name = file if isinstance(file, str) else text(file)
    raise UserError(f"the .json of {key} in {name} cannot be read: {reason}")
