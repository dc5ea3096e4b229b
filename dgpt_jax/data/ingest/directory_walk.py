"""Lists the images in a folder, an archive or a list; counts the files that are skipped."""

import contextlib
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from dgpt_jax.data.ingest import tar_index, zip_index
from dgpt_jax.data.ingest.image_index import BOM, OWN_FILE, ImageIndexBuilder, text
from dgpt_jax.data.ingest.names import hidden_above, is_hidden, is_image
from dgpt_jax.data.ingest.skipped_files import Skipped
from dgpt_jax.data.ingest.webdataset_samples import SampleCheck, is_shard
from dgpt_jax.errors import UserError
from dgpt_jax.storage import remote_listing
from dgpt_jax.storage.byte_ranges import RangeReader

COMPRESSED = (b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst", b".zip")
TFRECORD = re.compile(rb"\.tfrecords?(-\d+-of-\d+)?$")


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
    outside its folder. shards, tables, records: files of WebDataset, parquet and TFRecord, which
    are not looked into. tars: other tars that are files.
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
        self.shards: list[bytes] = []
        self.tables: list[bytes] = []
        self.records: list[bytes] = []
        self.tars: list[bytes] = []

    def add_folder(self, folder: bytes, prefix: bytes = b"", above: tuple[bytes, ...] = ()):
        """Adds a folder and follows links to folders, without cycles. Raises UserError if a folder
        or archive cannot be read: a class would be missing."""
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
            else:  # if broken, it is reported as unreadable later
                self._add_file(entry.path, prefix, -1 if kind == "broken" else entry.stat().st_size)

    def add_remote_folder(self, url: str):
        """Adds a folder on gs:// or s3://, page by page. Raises UserError."""
        url = url.rstrip("/")
        for name, size in remote_listing.files(url):
            folder, _ = posixpath.split(os.fsencode(name))
            if hidden := hidden_above(folder):
                self.skipped.folders.add(os.fsencode(url) + b"/" + hidden)
            else:
                renamed = b"".join(self._rename(f) + b"/" for f in folder.split(b"/") if f)
                self._add_file(os.fsencode(f"{url}/{name}"), renamed, size)

    def add_archive(self, path: bytes):
        """Adds a tar, zip or parquet file that is the source itself."""
        if path.endswith(b".tar"):
            self.add_tar(path)
        elif zip_index.is_zip(path):
            self.add_zip(path)
        else:
            self.tables.append(path)

    def add_shards(self, files: list[bytes]):
        """Adds the files of a pattern. Raises UserError if they are of another kind."""
        for suffix, group in ((b".tar", self.shards), (b".parquet", self.tables)):
            if all(file.endswith(suffix) for file in files):
                group += files
                return
        raise UserError(
            f"{text(files[0])}, …: a pattern must stand for WebDataset shards (.tar) or .parquet"
        )

    def _add_file(self, path: bytes, prefix: bytes, size: int):
        folder, name = posixpath.split(path)
        if name.endswith(b".tar"):
            self.add_tar(path, prefix + self._rename(name[:-4]) + b"/")
        elif zip_index.is_zip(name):
            self.add_zip(path, prefix + self._rename(name[:-4]) + b"/")
        elif is_image(name):
            self.builder.add(prefix + name, folder, OWN_FILE, size)
        elif name.endswith(b".parquet"):
            self.tables.append(path)
        elif TFRECORD.search(name):
            self.records.append(path)
        elif name.lower().endswith(COMPRESSED):
            self.skipped.compressed.append(text(path))
        else:
            self.skipped.add_file(name)

    def add_tar(self, path: bytes, prefix: bytes = b""):
        """Adds a tar, to `shards` if it is one of WebDataset. Raises UserError if it is compressed,
        damaged or ambiguous."""
        with _os_errors(path):
            if tool := tar_index.compression(path):
                raise UserError(unpack_first(text(path), tool))
            with RangeReader(path) as file:
                if is_shard(file):
                    self.shards.append(path)
                else:
                    self.tars.append(path)
                    self._add_members(file, path, text(path), prefix, 0, None)

    def add_zip(self, path: bytes, prefix: bytes = b""):
        """Adds a zip. Raises UserError if it is encrypted, damaged or not readable in place."""
        with _os_errors(path), RangeReader(path) as file:
            for name, offset, size in zip_index.members(file, self.skipped.notes.append):
                folder, base = posixpath.split(name)
                if hidden := hidden_above(folder):
                    self.skipped.folders.add(path + b"/" + prefix + hidden)
                elif is_image(base):
                    self.builder.add(prefix + name, path, offset, size)
                elif base.lower().endswith((*COMPRESSED, b".tar", b".parquet")):
                    self.skipped.compressed.append(f"{text(name)} in {text(path)}")
                else:
                    self.skipped.add_file(base)

    def _add_members(
        self, file: RangeReader, path: bytes, title: str, prefix: bytes, start: int, end: int | None
    ):
        sample = SampleCheck(title)
        for name, offset, size in tar_index.members(
            file, title, start, end, self.skipped.notes.append
        ):
            folder, base = posixpath.split(name)
            if hidden := hidden_above(folder):
                self.skipped.folders.add(path + b"/" + prefix + hidden)
                continue
            sample.add(name)
            if name.endswith(b".tar"):
                nested = prefix + posixpath.join(folder, self._rename(base[:-4])) + b"/"
                self._add_members(
                    file, path, f"{text(name)} in {title}", nested, offset, offset + size
                )
            elif is_image(base):
                self.builder.add(prefix + name, path, offset, size)
            elif base.lower().endswith(COMPRESSED):
                self.skipped.compressed.append(f"{text(name)} in {title}")
            else:
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


@contextlib.contextmanager
def _os_errors(path: bytes) -> Iterator[None]:
    """Context that turns OSError about an archive into UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{text(path)}: {e.strerror}") from e


def _entries(folder: bytes) -> Iterator[os.DirEntry]:
    try:
        entries = os.scandir(folder)
    except OSError as e:
        raise UserError(f"{text(folder)}: {e.strerror}: make it readable, or move it") from None
    with entries:
        yield from entries


def unpack_first(path: Path | str, tool: str) -> str:
    """Returns the message of the error about a compressed file."""
    return f"{path} is compressed, so that single images in it cannot be read: {tool} it first"
