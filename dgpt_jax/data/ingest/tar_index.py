"""Where the members of a tar lie, so that threads can read them in place.

Not `tarfile.open`: it keeps every member in memory, and takes an archive that was cut off between
two members for a whole one.
"""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dgpt_jax.schema import UserError

BLOCK = 512
CHUNK = 1 << 20
LINKS = 8  # to a link to a link …
# First bytes of compressed files, and what undoes them.
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}


def is_tar(path) -> bool:
    """By the name, or the mark in the first header."""
    if os.fspath(path).endswith(".tar"):
        return True
    with open(path, "rb") as file:
        return file.read(BLOCK)[257:262] == b"ustar"


def compression(path) -> str | None:
    """The command that unpacks a compressed file; None where it is not compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((tool for mark, tool in COMPRESSED.items() if start.startswith(mark)), None)


def members(
    file: int,
    path,
    start: int = 0,
    end: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) in bytes of the files in a tar, as they lie in the archive.

    The tar is what lies between `start` and `end` of an open file (a descriptor); `path` is what
    errors call it. Links come last and lie where their files lie; of a symbolic link to a folder,
    the files in that. A hard link to nothing has size 0. `note` is given a line where the archive's
    end is not the file's, and for each symbolic link out of the archive, to nothing in it, or to a
    folder that holds it. Raises UserError where the tar is cut off or damaged.
    """
    end = os.fstat(file).st_size if end is None else end
    links: dict[bytes, _Link] = {}
    for name, offset, size, link in _members(file, path, start, end, note):
        if link:
            links[name] = link
        else:
            yield name, offset, size
    if links:  # a second pass, so that not every name is kept in memory
        again = _members(file, path, start, end, lambda _: None)
        files = ((name, offset, size) for name, offset, size, link in again if not link)
        yield from _followed(links, files, path, start, note)


@dataclass(frozen=True, slots=True)
class _Link:
    """target: a path in the archive; None where a symbolic link leads out of it."""

    target: bytes | None
    symbolic: bool


def _followed(
    links: dict[bytes, _Link], files: Iterable[tuple[bytes, int, int]], path, start: int, note
) -> Iterator[tuple[bytes, int, int]]:
    """What `links` lead to, as `members` gives it."""
    targets = {link.target for link in links.values()}
    places: dict[bytes, tuple[int, int]] = {}
    inside: dict[bytes, list[tuple[bytes, int, int]]] = {}  # of folders that are targets

    def add(name: bytes, offset: int, size: int):
        if name in targets:
            places[name] = offset, size
        for folder in _above(name):
            if folder in targets:
                inside.setdefault(folder, []).append((name[len(folder) + 1 :], offset, size))

    for one in files:
        add(*one)
    ends = {name: _end(links, link.target) for name, link in links.items()}
    for name, target in ends.items():
        if target in places:
            add(name, *places[target])
    inner: dict[bytes, list[bytes]] = {}  # of folders that are targets: links to folders in them
    for _ in range(LINKS):  # a folder may hold nothing but such links
        for name, target in ends.items():
            for folder in _above(name) if target in inside and links[name].symbolic else ():
                if folder in targets and name not in inner.setdefault(folder, []):
                    inner[folder].append(name)
                    inside.setdefault(folder, [])

    def linked(name: bytes, *passed: bytes):
        """What lies under `name`; `passed`: links on the way to it, the last one stands for it."""
        target = ends[passed[-1]]
        if len(passed) > LINKS or any(_holds(target, link) for link in passed):
            note(f"{os.fsdecode(name)} in {path}, a link to a folder that holds it")
            return
        yield from ((name + b"/" + rest, *place) for rest, *place in inside[target])
        for deeper in inner.get(target, ()):
            yield from linked(name + deeper[len(target) :], *passed, deeper)

    for name, target in ends.items():
        called = f"{os.fsdecode(name)} in {path}"
        if target in places:
            yield name, *places[target]
        elif not links[name].symbolic:
            yield name, start, 0
        elif target is None:
            note(f"{called}, a link out of it")
        elif target and target not in inside:
            note(f"{called}, a link to nothing in it")
        else:
            yield from linked(name, name)


def _end(links: dict[bytes, _Link], target: bytes | None) -> bytes | None:
    """Where links that begin at `target` lead; LINKS of them are followed."""
    for _ in range(LINKS):
        if target not in links:
            break
        target = links[target].target
    return target


def _holds(folder: bytes, path: bytes) -> bool:
    """Whether a path lies in a folder; all lie in b""."""
    return not folder or path.startswith(folder + b"/")


def _above(name: bytes) -> Iterator[bytes]:
    """The folders that hold a path."""
    while name := posixpath.dirname(name):
        yield name


def _members(
    file: int, path, start: int, end: int, note
) -> Iterator[tuple[bytes, int, int, _Link | None]]:
    """As `members`, with where a link leads."""
    if start == end:
        raise UserError(f"{path} is empty")
    position, last = start, "its beginning"
    longer: dict[str, bytes] = {}  # what headers before a member say instead of its own
    while True:
        block = os.pread(file, BLOCK, position) if position + BLOCK <= end else b""
        if len(block) < BLOCK:
            raise UserError(
                f"{path} is truncated: it ends at byte {end - start}, after {last}, without the "
                f"empty block that ends a tar; copy or download it again"
            )
        if block.count(0) == BLOCK:
            _note_rest(file, path, position - start, start, end, note)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as e:
            raise UserError(
                f"{path} is no tar or damaged at byte {position - start}, after {last}: {e}"
            ) from None
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        is_note = info.type in (
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
        )  # fmt: skip
        told = {} if is_note else longer
        name = told.get("path", os.fsencode(info.name))
        size = told.get("size", b"%d" % info.size)
        if not size.isdigit() or len(size) > 20:
            raise UserError(
                f"{path} is damaged at byte {position - start}: the size of {os.fsdecode(name)} is "
                f"{size[:20].decode(errors='backslashreplace')}"
            )
        length = int(size) if has_data or is_note else 0
        data = position + BLOCK
        if data + length > end:
            raise UserError(
                f"{path} is truncated: it ends at byte {end - start}, within {os.fsdecode(name)} "
                f"(bytes {data - start} to {data + length - start}); copy or download it again"
            )
        if is_note:
            longer |= _header(info.type, os.pread(file, length, data))
        else:
            longer = {}
            if has_data or info.islnk() or info.issym():
                link, target = None, told.get("linkpath", os.fsencode(info.linkname))
                if info.islnk():
                    link = _Link(_clean(target), symbolic=False)
                elif info.issym():
                    link = _Link(_relative(_clean(name), target), symbolic=True)
                yield _clean(name), data, length, link
            last = os.fsdecode(name)
        position = data + -(-length // BLOCK) * BLOCK


def _note_rest(file: int, path, position: int, start: int, end: int, note):
    """Notes what follows the empty block that ends a tar, if it is anything but zeros."""
    for chunk in range(start + position, end, CHUNK):
        data = os.pread(file, min(CHUNK, end - chunk), chunk)
        if data.count(0) < len(data):
            note(
                f"what follows the end of {path} at byte {position}: if these are several tars in "
                f"one file, split it there"
            )
            return


def _header(kind: bytes, data: bytes) -> dict[str, bytes]:
    """What a header of its own says of the next member: path, size and target of a link."""
    if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        key = "path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath"
        return {key: data.rstrip(b"\0")}
    found = {}
    while kind == tarfile.XHDTYPE and data:  # records "LENGTH KEY=VALUE\n"
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not int(length):
            break
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size", b"linkpath"):
            found[key.decode()] = value
    return found


def _clean(name: bytes) -> bytes:
    """As a path within the archive: some begin with "./", "/" or, to write elsewhere, "../"."""
    return posixpath.normpath(b"/" + name.lstrip(b"/"))[1:]


def _relative(name: bytes, target: bytes) -> bytes | None:
    """Where a symbolic link of this name leads; None: out of the archive."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if path.startswith(b"/") or path == b".." or path.startswith(b"../"):
        return None
    return b"" if path == b"." else path
