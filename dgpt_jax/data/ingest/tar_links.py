"""Links in a tar: their targets within the archive, and the files in linked folders."""

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_LINKS = 8  # length of a chain of links

Note = Callable[[str], None]
Member = tuple[bytes, int, int]  # name, offset, size


@dataclass(frozen=True, slots=True)
class Link:
    """A link to `target`, a path in the archive; None if a symbolic link leaves it."""

    target: bytes | None
    symbolic: bool


def resolve(
    links: dict[bytes, Link], files: Iterable[Member], path: Path | str, start: int, note: Note
) -> Iterator[Member]:
    """Yields (name, offset, size) of links, like `tar_index.members`; `files`: all that are none.

    `path` names the tar in notes; its range begins at `start`.
    """
    ends = {name: _follow(links, link.target) for name, link in links.items()}
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


def _follow(links: dict[bytes, Link], target: bytes | None) -> bytes | None:
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


def target_in_archive(name: bytes, target: bytes) -> bytes | None:
    """Returns the target of the symbolic link `name`; None if it is outside the archive."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if path.startswith(b"/") or path == b".." or path.startswith(b"../"):
        return None
    return b"" if path == b"." else path
