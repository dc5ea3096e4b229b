"""Lists the images below a folder, in a tar or of a list; what is passed over is counted."""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dgpt_jax import tars
from dgpt_jax.members import BOM, OWN_FILE, Columns, text
from dgpt_jax.schema import UserError
from dgpt_jax.user_images import EXTENSIONS

PACKED = (b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst", b".zip")
# Folders of operating systems, file servers and programs; so are all that begin with a dot.
SYSTEM = (
    b"__MACOSX", b"__pycache__", b"@eaDir", b"@Recycle", b"@Recently-Snapshot", b"@tmp",
    b"#recycle", b"#snapshot", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found",
)  # fmt: skip
WEBDATASET = (b".cls", b".json", b".txt")
SHOWN = 12  # kinds or lines of what was passed over


@dataclass
class Passed:
    """What was passed over: compressed files, hidden folders, files that are no images by their
    extension, and the rest as lines."""

    compressed: list[str] = field(default_factory=list)
    folders: set[bytes] = field(default_factory=set)
    extensions: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def file(self, name: bytes):
        """Counts a file by its extension."""
        extension = text(posixpath.splitext(name)[1]).lower()
        if name.startswith(b"._"):
            extension = "._* of macOS"
        elif not extension[1:].isalnum() or extension[1:].isdigit() or len(extension) > 10:
            extension = "without a known extension"
        self.extensions[extension] += 1

    def lines(self) -> list[str]:
        """A line for each kind."""
        folders = Counter(text(posixpath.basename(folder)) for folder in self.folders)
        lines = [
            f"passed over {kind}: {_counts(counter)}"
            for kind, counter in (("files", self.extensions), ("hidden or system folders", folders))
            if counter
        ]
        lines += [
            f"passed over, because it is compressed: {path}" for path in sorted(self.compressed)
        ]
        lines += [f"passed over: {note}" for note in sorted(self.notes)[:SHOWN]]
        if (more := len(self.notes) - SHOWN) > 0:
            lines.append(f"passed over: {more} more links, pipes, sockets or devices")
        return lines


def _counts(counter: Counter) -> str:
    shown = [f"{count} {name}" for name, count in sorted(counter.items(), key=_most_first)]
    return ", ".join(shown[:SHOWN]) + ", …" * (len(shown) > SHOWN)


def _most_first(item: tuple[str, int]):
    return -item[1], item[0]


def is_image(name: bytes) -> bool:
    """By its extension; "._x.jpg" is what macOS notes beside x.jpg."""
    return not name.startswith(b"._") and text(name[-6:]).lower().endswith(EXTENSIONS)


def is_hidden(folder: bytes) -> bool:
    """True for the name of a folder that no one made for images."""
    return folder in SYSTEM or (folder.startswith(b".") and folder not in (b".", b".."))


def kind_of(entry: os.DirEntry) -> str:
    """ "folder", "file", "special" (a pipe, socket or device), or "lost": a link to nothing."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special" if os.path.exists(entry.path) else "lost"
    except OSError:  # a link to itself
        return "lost"


class Walk:
    """Gathers the images of a source; `rename` gives the folder that a tar or folder stands for.

    classes: names and numbers of a list's classes. elsewhere: True where a list names files outside
    its folder.
    """

    def __init__(self, say=lambda _: None, rename=lambda name: name):
        self.columns, self.passed = Columns(say), Passed()
        self._rename = rename
        self.classes: dict[str, int] = {}
        self.elsewhere = False

    def folder(self, folder: bytes, prefix: bytes = b"", above: tuple = ()):
        """Follows links to folders, but not round in circles. Raises UserError where a folder or
        tar cannot be read: a class would be missing."""
        real = os.path.realpath(folder)
        if any((inner + b"/").startswith(real.rstrip(b"/") + b"/") for inner in above):
            self.passed.notes.append(f"{text(folder)}, a link to a folder that holds it")
            return
        for entry in _entries(folder):
            kind, name = kind_of(entry), entry.name
            if kind == "folder" and is_hidden(name):
                self.passed.folders.add(entry.path)
            elif kind == "folder":
                self.folder(entry.path, prefix + self._rename(name) + b"/", (*above, real))
            elif kind == "special":
                self.passed.notes.append(f"{text(entry.path)}, a pipe, socket or device")
            elif kind == "lost" and not is_image(name):
                self.passed.notes.append(f"{text(entry.path)}, a link to nothing")
            elif name.endswith(b".tar"):
                self.tar(entry.path, prefix + self._rename(name[:-4]) + b"/")
            elif is_image(name):  # if lost, it is among the unreadable files later
                size = -1 if kind == "lost" else entry.stat().st_size
                self.columns.add(prefix + name, folder, OWN_FILE, size)
            elif name.lower().endswith(PACKED):
                self.passed.compressed.append(text(entry.path))
            else:
                self.passed.file(name)

    def tar(self, path: bytes, prefix: bytes = b""):
        """Raises UserError where it is compressed, damaged, or a WebDataset shard."""
        try:
            if tool := tars.compression(path):
                raise UserError(unpack_first(text(path), tool))
            with open(path, "rb") as file:
                self._members(file.fileno(), path, text(path), prefix, 0, None)
        except OSError as e:
            raise UserError(f"{text(path)}: {e.strerror}") from e

    def _members(self, file: int, path: bytes, called: str, prefix: bytes, start: int, end):
        sample = _Sample(called)
        for name, offset, size in tars.members(file, called, start, end, self.passed.notes.append):
            folder, base = posixpath.split(name)
            if hidden := _hidden_above(folder):
                self.passed.folders.add(path + b"/" + prefix + hidden)
            elif name.endswith(b".tar"):
                inside = prefix + posixpath.join(folder, self._rename(base[:-4])) + b"/"
                self._members(
                    file, path, f"{text(name)} in {called}", inside, offset, offset + size
                )
            elif is_image(base):
                sample.add(name, is_label=False)
                self.columns.add(prefix + name, path, offset, size)
            elif base.lower().endswith(PACKED):
                self.passed.compressed.append(f"{text(name)} in {called}")
            else:
                if base.lower().endswith(WEBDATASET) and not base.startswith(b"._"):
                    sample.add(name, is_label=True)
                self.passed.file(base)

    def list(self, src: Path):
        """Every line counts, whatever the file's extension."""
        folder, with_class = os.fsencode(src.parent), None
        with src.open("rb") as lines:
            if b"\0" in lines.read(4096):
                raise UserError(f"{src} is neither a folder nor a tar nor a list of image files")
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(BOM) if number == 1 else line
                path, tab, name = line.strip(b"\r\n").partition(b"\t")
                if not path:
                    continue
                if with_class not in (None, bool(tab)):
                    raise UserError(f"{src}, line {number}: a TAB and a class in all lines or none")
                with_class = bool(tab)
                file = os.path.join(folder, path)
                try:
                    status = os.stat(file)
                except OSError as e:
                    raise UserError(f"{src}, line {number}: {text(file)}: {e.strerror}") from None
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(f"{src}, line {number}: {text(file)} is no regular file")
                label = self.classes.setdefault(text(name), len(self.classes)) if tab else -1
                path = posixpath.normpath(path)
                self.elsewhere |= path.startswith((b"/", b"../"))
                self.columns.add(path, os.path.dirname(file), OWN_FILE, status.st_size, label)


class _Sample:
    """The last member of a tar and its kind. Raises UserError where an image and a label of one
    name follow each other: the samples of a WebDataset are not spread."""

    def __init__(self, called: str):
        self._called, self._key, self._names = called, None, {}

    def add(self, name: bytes, is_label: bool):
        key = posixpath.splitext(name)[0]
        self._names = self._names if key == self._key else {}
        self._key, self._names[is_label] = key, name
        if len(self._names) == 2:
            raise UserError(
                f"{self._called} is a shard of a WebDataset ({text(self._names[False])} beside "
                f"{text(self._names[True])}), whose labels are not read: unpack all shards into "
                f'one folder, and import that with --labels, a file of "name<TAB>class" lines'
            )


def _entries(folder: bytes) -> Iterator[os.DirEntry]:
    try:
        entries = os.scandir(folder)
    except OSError as e:
        raise UserError(
            f"{text(folder)}: {e.strerror}: make it readable, or move it away"
        ) from None
    with entries:
        yield from entries


def _hidden_above(folder: bytes) -> bytes:
    """The path of the first hidden folder on the way to `folder`; b"" where there is none."""
    names = folder.split(b"/")
    for i, name in enumerate(names):
        if is_hidden(name):
            return b"/".join(names[: i + 1])
    return b""


def unpack_first(path, tool: str) -> str:
    return (
        f"{path} is compressed, so that images in it cannot be read by themselves: {tool} it first"
    )
