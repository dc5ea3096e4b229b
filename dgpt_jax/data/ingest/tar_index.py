"""Byte ranges of the members of a tar, so that threads can read them in place.

`tarfile.open` would keep every member in memory, and accept an archive that is truncated between
two members.
"""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges
from dgpt_jax.storage.byte_ranges import RangeReader

BLOCK = 512
CHUNK = 1 << 20
MAX_LINKS = 8  # length of a chain of links
# First bytes of compressed files, and the commands that decompress them.
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}

Note = Callable[[str], None]
Member = tuple[bytes, int, int]  # name, offset, size


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
    links: dict[bytes, _Link] = {}
    for name, offset, size, link in _members(file, path, start, end, note):
        if link:
            links[name] = link
        else:
            yield name, offset, size
    if links:  # a second pass, to avoid keeping every name in memory
        again = _members(file, path, start, end, lambda _: None)
        files = ((name, offset, size) for name, offset, size, link in again if not link)
        yield from _resolve_links(links, files, path, start, note)


@dataclass(frozen=True, slots=True)
class _Link:
    """target: a path in the archive; None if a symbolic link leaves it."""

    target: bytes | None
    symbolic: bool


def _resolve_links(
    links: dict[bytes, _Link], files: Iterable[Member], path: Path | str, start: int, note: Note
) -> Iterator[Member]:
    """Yields the targets of links, like `members`."""
    ends = {name: _resolve(links, link.target) for name, link in links.items()}
    targets = {link.target for link in links.values()} | set(ends.values())
    ranges: dict[bytes, tuple[int, int]] = {}
    contents: dict[bytes, list[Member]] = {}  # of folders that are targets

    def add(name: bytes, offset: int, size: int):
        if name in targets:
            ranges[name] = offset, size
        for folder in _parents(name):
            if folder in targets:
                contents.setdefault(folder, []).append((name[len(folder) + 1 :], offset, size))

    for name, offset, size in files:
        add(name, offset, size)
    for name, target in ends.items():
        if target in ranges:
            add(name, *ranges[target])
    inner: dict[bytes, list[bytes]] = {}  # links to folders, inside folders that are targets
    for _ in range(MAX_LINKS):  # a folder may contain only such links
        for name, target in ends.items():
            for folder in _parents(name) if target in contents and links[name].symbolic else ():
                if folder in targets and name not in inner.setdefault(folder, []):
                    inner[folder].append(name)
                    contents.setdefault(folder, [])

    def in_linked_folder(name: bytes, *chain: bytes) -> Iterator[Member]:
        """Yields the files of a linked folder; `chain`: the links followed so far."""
        target = ends[chain[-1]]
        assert target is not None
        if len(chain) > MAX_LINKS or any(_contains(target, link) for link in chain):
            note(f"{os.fsdecode(name)} in {path}, a link to a folder that contains it")
            return
        for rest, offset, size in contents[target]:
            yield name + b"/" + rest, offset, size
        for link in inner.get(target, ()):
            yield from in_linked_folder(name + link[len(target) :], *chain, link)

    for name, target in ends.items():
        title = f"{os.fsdecode(name)} in {path}"
        if target in ranges:
            yield name, *ranges[target]
        elif not links[name].symbolic:
            yield name, start, 0
        elif target is None:
            note(f"{title}, a link out of it")
        elif target and target not in contents:
            note(f"{title}, a broken link")
        else:
            yield from in_linked_folder(name, name)


def _resolve(links: dict[bytes, _Link], target: bytes | None) -> bytes | None:
    """Follows up to MAX_LINKS links from `target`, or from folders on the path to it."""
    for _ in range(MAX_LINKS):
        if target is None:
            break
        link = next((path for path in (target, *_parents(target)) if path in links), None)
        if link is None:
            break
        end, rest = links[link].target, target[len(link) :]
        target = None if end is None else (end + rest).lstrip(b"/")
    return target


def _contains(folder: bytes, path: bytes) -> bool:
    """True if a path is in a folder; all are in b""."""
    return not folder or path.startswith(folder + b"/")


def _parents(name: bytes) -> Iterator[bytes]:
    """Yields the parent folders of a path."""
    while name := posixpath.dirname(name):
        yield name


def _members(
    file: RangeReader, path: Path | str, start: int, end: int, note: Note
) -> Iterator[tuple[bytes, int, int, _Link | None]]:
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
                    link = _Link(clean_path(target), symbolic=False)
                elif info.issym():
                    link = _Link(_relative(clean_path(name), target), symbolic=True)
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


def _relative(name: bytes, target: bytes) -> bytes | None:
    """Returns the target of the symbolic link `name`; None if it is outside the archive."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if path.startswith(b"/") or path == b".." or path.startswith(b"../"):
        return None
    return b"" if path == b"." else path
