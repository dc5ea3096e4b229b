"""Byte ranges of the members of a tar, so that threads can read them in place.

`tarfile.open` would keep every member in memory, and accept an archive that is truncated between
two members.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path

from dgpt_jax.data.ingest import tar_links
from dgpt_jax.data.ingest.tar_links import Link, Member, Note
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges
from dgpt_jax.storage.byte_ranges import RangeReader

BLOCK = 512
CHUNK = 1 << 20
# First bytes of compressed files, and the commands that decompress them.
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}


def is_tar(path: str) -> bool:
    """True for the name of a tar, or its magic number in the first header."""
    if path.endswith(".tar"):
        return True
    return byte_ranges.read(path, 0, BLOCK)[257:262] == b"ustar"


def compression(path: str | bytes) -> str | None:
    """Returns the command that decompresses a file; None if it is not compressed."""
    start = byte_ranges.read(path, 0, 8)
    return next((tool for magic, tool in COMPRESSED.items() if start.startswith(magic)), None)


def members(
    file: RangeReader,
    path: Path | str,
    start: int = 0,
    end: int | None = None,
    note: Note = lambda _: None,
) -> Iterator[Member]:
    """Yields (name, offset, size) of the files in a tar, offset and size in bytes.

    The tar is the range from `start` to `end` of an open file; `path` names it in errors. Links
    come last and have the range of their target; a symbolic link to a folder yields the files in
    it. A broken hard link has size 0. `note` logs data after the archive's end, and symbolic links
    that leave the archive, are broken, or point to a folder that contains them. Raises UserError if
    the tar is truncated or damaged.
    """
    end = file.size if end is None else end
    links: dict[bytes, Link] = {}
    for name, offset, size, link in _members(file, path, start, end, note):
        if link:
            links[name] = link
        else:
            yield name, offset, size
    if links:  # a second pass, to avoid keeping every name in memory
        again = _members(file, path, start, end, lambda _: None)
        files = ((name, offset, size) for name, offset, size, link in again if not link)
        yield from tar_links.resolve(links, files, path, start, note)


def _members(
    file: RangeReader, path: Path | str, start: int, end: int, note: Note
) -> Iterator[tuple[bytes, int, int, Link | None]]:
    """Yields (name, offset, size, link or None) of all members."""
    if start == end:
        raise UserError(f"{path} is empty")
    position, last = start, "the start"
    extended: dict[str, bytes] = {}  # fields of extended headers, which override the next header
    while True:
        block = file.read_at(position, BLOCK) if position + BLOCK <= end else b""
        if len(block) < BLOCK:
            raise UserError(
                f"{path} is truncated: it ends at byte {end - start}, after {last}, without the "
                f"empty block that ends a tar; copy or download it again"
            )
        if block.count(0) == BLOCK:
            _note_trailing_data(file, path, position - start, start, end, note)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as e:
            raise UserError(
                f"{path} is not a tar or is damaged at byte {position - start}, after {last}: {e}"
            ) from None
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        is_extended = info.type in (
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
        )  # fmt: skip
        override = {} if is_extended else extended
        name = override.get("path", os.fsencode(info.name))
        size = override.get("size", b"%d" % info.size)
        if not size.isdigit() or len(size) > 20:
            raise UserError(
                f"{path} is damaged at byte {position - start}: the size of {os.fsdecode(name)} is "
                f"{size[:20].decode(errors='backslashreplace')}"
            )
        length = int(size) if has_data or is_extended else 0
        data = position + BLOCK
        if data + length > end:
            raise UserError(
                f"{path} is truncated: it ends at byte {end - start}, within {os.fsdecode(name)} "
                f"(bytes {data - start} to {data + length - start}); copy or download it again"
            )
        if is_extended:
            extended |= _extended_fields(info.type, file.read_at(data, length))
        else:
            extended = {}
            if has_data or info.islnk() or info.issym():
                link, target = None, override.get("linkpath", os.fsencode(info.linkname))
                if info.islnk():
                    link = Link(clean_path(target), symbolic=False)
                elif info.issym():
                    link = Link(
                        tar_links.target_in_archive(clean_path(name), target), symbolic=True
                    )
                yield clean_path(name), data, length, link
            last = os.fsdecode(name)
        position = data + -(-length // BLOCK) * BLOCK


def _note_trailing_data(file: RangeReader, path, position: int, start: int, end: int, note: Note):
    """Notes data after the empty block that ends a tar, unless they are zeros."""
    for chunk in range(start + position, end, CHUNK):
        data = file.read_at(chunk, min(CHUNK, end - chunk))
        if data.count(0) < len(data):
            note(
                f"data after the end of {path} at byte {position}: if the file is several tars, "
                f"split it there"
            )
            return


def _extended_fields(kind: bytes, data: bytes) -> dict[str, bytes]:
    """Parses path, size and link target of the next member from an extended header."""
    if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        key = "path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath"
        return {key: data.rstrip(b"\0")}
    fields = {}
    while kind == tarfile.XHDTYPE and data:  # records "LENGTH KEY=VALUE\n"
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not int(length):
            break
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size", b"linkpath"):
            fields[key.decode()] = value
    return fields


def clean_path(name: bytes) -> bytes:
    """Returns a path in the archive, without a leading "./", "/" or "../"."""
    return posixpath.normpath(b"/" + name.lstrip(b"/"))[1:]
