"""Counts of the files that an import skips, by kind."""

import posixpath
from collections import Counter
from dataclasses import dataclass, field

from dgpt_jax.data.ingest.image_index import text

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
