"""Lists the images in a folder, a tar or a list; counts the files that are skipped."""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dgpt_jax.data.ingest import tar_index
from dgpt_jax.data.ingest.image_index import BOM, OWN_FILE, ImageIndexBuilder, text
from dgpt_jax.data.ingest.user_images import EXTENSIONS
from dgpt_jax.errors import UserError

COMPRESSED = (b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst", b".zip")
# Folders of operating systems, file servers and programs, besides those that begin with a dot.
SYSTEM = (
    b"__MACOSX", b"__pycache__", b"@eaDir", b"@Recycle", b"@Recently-Snapshot", b"@tmp",
    b"#recycle", b"#snapshot", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found",
)  # fmt: skip
WEBDATASET = (b".cls", b".json", b".txt")
MAX_SHOWN = 12  # kinds of files, or lines


@dataclass
class Skipped:
    """Skipped files: compressed ones, hidden folders, non-images by extension, others as notes."""

    compressed: list[str] = field(default_factory=list)
    folders: set[bytes] = field(default_factory=set)
    extensions: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add_file(self, name: bytes):
        """Counts a file by its extension."""
        extension = text(posixpath.splitext(name)[1]).lower()
        if name.startswith(b"._"):
            extension = "._* of macOS"
        elif not extension[1:].isalnum() or extension[1:].isdigit() or len(extension) > 10:
            extension = "without a known extension"
        self.extensions[extension] += 1

    def lines(self) -> list[str]:
        """Returns report lines, one per kind."""
        folders = Counter(text(posixpath.basename(folder)) for folder in self.folders)
        lines = [
            f"skipped {kind}: {_counts(counter)}"
            for kind, counter in (("files", self.extensions), ("hidden or system folders", folders))
            if counter
        ]
        lines += [f"skipped, because it is compressed: {path}" for path in sorted(self.compressed)]
        lines += [f"skipped: {note}" for note in sorted(self.notes)[:MAX_SHOWN]]
        if (more := len(self.notes) - MAX_SHOWN) > 0:
            lines.append(f"skipped: {more} more links, pipes, sockets or devices")
        return lines


def _counts(counter: Counter) -> str:
    items = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {name}" for name, count in items[:MAX_SHOWN]]
    return ", ".join(shown) + ", …" * (len(items) > MAX_SHOWN)


def is_image(name: bytes) -> bool:
    """True for the extension of an image; "._x.jpg" is macOS metadata of x.jpg."""
    return not name.startswith(b"._") and text(name[-6:]).lower().endswith(EXTENSIONS)


def is_hidden(folder: bytes) -> bool:
    """True for names of system folders, which are not meant for images."""
    return folder in SYSTEM or (folder.startswith(b".") and folder not in (b".", b".."))


def kind_of(entry: os.DirEntry) -> str:
    """Returns "folder", "file", "special" (a pipe, socket or device) or "broken" (link)."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special" if os.path.exists(entry.path) else "broken"
    except OSError:  # a link to itself
        return "broken"


class Walk:
    """Collects the images of a source; `rename` maps names of tars and folders to folder names.

    classes: names and numbers of the classes in a list. elsewhere: True if a list names files
    outside its folder.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda _: None,
        rename: Callable[[bytes], bytes] = lambda name: name,
    ):
        self.builder, self.skipped = ImageIndexBuilder(say), Skipped()
        self._rename = rename
        self.classes: dict[str, int] = {}
        self.elsewhere = False

    def add_folder(self, folder: bytes, prefix: bytes = b"", above: tuple[bytes, ...] = ()):
        """Adds a folder and follows links to folders, without cycles. Raises UserError if a folder
        or tar cannot be read: a class would be missing."""
        real = os.fsencode(os.path.realpath(folder))
        if any((inner + b"/").startswith(real.rstrip(b"/") + b"/") for inner in above):
            self.skipped.notes.append(f"{text(folder)}, a link to a folder that contains it")
            return
        for entry in _entries(folder):
            kind, name = kind_of(entry), entry.name
            if kind == "folder" and is_hidden(name):
                self.skipped.folders.add(entry.path)
            elif kind == "folder":
                self.add_folder(entry.path, prefix + self._rename(name) + b"/", (*above, real))
            elif kind == "special":
                self.skipped.notes.append(f"{text(entry.path)}, a pipe, socket or device")
            elif kind == "broken" and not is_image(name):
                self.skipped.notes.append(f"{text(entry.path)}, a broken link")
            elif name.endswith(b".tar"):
                self.add_tar(entry.path, prefix + self._rename(name[:-4]) + b"/")
            elif is_image(name):  # if broken, it is reported as unreadable later
                size = -1 if kind == "broken" else entry.stat().st_size
                self.builder.add(prefix + name, folder, OWN_FILE, size)
            elif name.lower().endswith(COMPRESSED):
                self.skipped.compressed.append(text(entry.path))
            else:
                self.skipped.add_file(name)

    def add_tar(self, path: bytes, prefix: bytes = b""):
        """Adds a tar. Raises UserError if it is compressed, damaged, or a WebDataset shard."""
        try:
            if tool := tar_index.compression(path):
                raise UserError(unpack_first(text(path), tool))
            with open(path, "rb") as file:
                self._add_members(file.fileno(), path, text(path), prefix, 0, None)
        except OSError as e:
            raise UserError(f"{text(path)}: {e.strerror}") from e

    def _add_members(
        self, file: int, path: bytes, title: str, prefix: bytes, start: int, end: int | None
    ):
        sample = _WebDatasetCheck(title)
        for name, offset, size in tar_index.members(
            file, title, start, end, self.skipped.notes.append
        ):
            folder, base = posixpath.split(name)
            if hidden := _hidden_above(folder):
                self.skipped.folders.add(path + b"/" + prefix + hidden)
            elif name.endswith(b".tar"):
                nested = prefix + posixpath.join(folder, self._rename(base[:-4])) + b"/"
                self._add_members(
                    file, path, f"{text(name)} in {title}", nested, offset, offset + size
                )
            elif is_image(base):
                sample.add(name, is_label=False)
                self.builder.add(prefix + name, path, offset, size)
            elif base.lower().endswith(COMPRESSED):
                self.skipped.compressed.append(f"{text(name)} in {title}")
            else:
                if base.lower().endswith(WEBDATASET) and not base.startswith(b"._"):
                    sample.add(name, is_label=True)
                self.skipped.add_file(base)

    def add_list(self, src: Path):
        """Adds the files of a list, whatever their extensions. Raises UserError."""
        folder, has_classes = os.fsencode(src.parent), None
        with src.open("rb") as lines:
            if b"\0" in lines.read(4096):
                raise UserError(f"{src} is not a folder, a tar or a list of image files")
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(BOM) if number == 1 else line
                path, tab, name = line.strip(b"\r\n").partition(b"\t")
                if not path:
                    continue
                if has_classes not in (None, bool(tab)):
                    raise UserError(f"{src}, line {number}: give a class on all lines or none")
                has_classes = bool(tab)
                file = os.path.join(folder, path)
                try:
                    status = os.stat(file)
                except OSError as e:
                    raise UserError(f"{src}, line {number}: {text(file)}: {e.strerror}") from None
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(f"{src}, line {number}: {text(file)} is not a regular file")
                label = self.classes.setdefault(text(name), len(self.classes)) if tab else -1
                path = posixpath.normpath(path)
                self.elsewhere |= path.startswith((b"/", b"../"))
                self.builder.add(path, os.path.dirname(file), OWN_FILE, status.st_size, label)


class _WebDatasetCheck:
    """Raises UserError if an image and a label of one name follow each other in a tar."""

    def __init__(self, title: str):
        self._title, self._key, self._names = title, None, {}

    def add(self, name: bytes, is_label: bool):
        key = posixpath.splitext(name)[0]
        self._names = self._names if key == self._key else {}
        self._key, self._names[is_label] = key, name
        if len(self._names) == 2:
            raise UserError(
                f"{self._title} is a shard of a WebDataset ({text(self._names[False])} next to "
                f"{text(self._names[True])}), whose labels are not supported: unpack all shards "
                f'into one folder, and import it with --labels, a file of "name<TAB>class" lines'
            )


def _entries(folder: bytes) -> Iterator[os.DirEntry]:
    try:
        entries = os.scandir(folder)
    except OSError as e:
        raise UserError(f"{text(folder)}: {e.strerror}: make it readable, or move it") from None
    with entries:
        yield from entries


def _hidden_above(folder: bytes) -> bytes:
    """Returns the first hidden folder in a path, with its parents; b"" if there is none."""
    names = folder.split(b"/")
    for i, name in enumerate(names):
        if is_hidden(name):
            return b"/".join(names[: i + 1])
    return b""


def unpack_first(path: Path | str, tool: str) -> str:
    """Returns the message of the error about a compressed file."""
    return f"{path} is compressed, so that single images in it cannot be read: {tool} it first"
