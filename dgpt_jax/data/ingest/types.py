"""Protocol of an import's source: the images of one split, in order, however they are stored.

`image_index.ImageIndex` are files and byte ranges of tars and zips, `webdataset_index.SampleIndex`
samples of WebDataset shards, `parquet_index.Rows` rows of parquet files.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dgpt_jax.errors import UserError

OWN_FEATURES = ("id", "image", "label")


class Entry(Protocol):
    """One image. label: -1 if there is none."""

    @property
    def id(self) -> str: ...

    @property
    def label(self) -> int: ...

    def read(self) -> bytes:
        """Reads the encoded bytes. Raises UnreadableImage or OSError if only this image is at
        fault, and is skipped; UserError if the import must stop."""
        ...

    def texts(self) -> Mapping[str, str]:
        """Returns the text columns that are kept; "" for a missing value. Raises UserError."""
        ...


class Images(Protocol):
    """The images of one split. Iteration is sequential, and may begin at any shard."""

    @property
    def num_bytes(self) -> int:
        """Size of all images; an estimate where only a reader of all of them would know."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Entry]: ...

    def take(self, rows: slice, /) -> "Images":
        """Returns consecutive images."""
        ...

    def update_digest(self, state: "hashlib._Hash") -> None:
        """Hashes all that determines the dataset, except the contents of the images."""
        ...


@dataclass(frozen=True)
class Columns:
    """Columns of parquet files, or members and JSON keys of WebDataset samples.

    image, label: None chooses the only one there is; label "" imports none. keep: stored as text.
    """

    image: str | None = None
    label: str | None = None
    keep: tuple[str, ...] = ()

    @classmethod
    def parse(cls, image: str | None, label: str | None, keep: str | None) -> "Columns":
        """Parses "NAME,NAME" of `keep`. Raises UserError."""
        names = tuple(filter(None, (keep or "").split(",")))
        for name in names:
            if name in OWN_FEATURES or names.count(name) > 1 or not re.fullmatch(r"\w+", name):
                raise UserError(
                    f"--keep={keep}: {name!r} must be one column of letters, digits and _, and "
                    f"not {', '.join(OWN_FEATURES)}"
                )
        return cls(image, label, names)

    def require_none(self, src: Any):
        """Raises UserError if a column is named for a source that has no columns."""
        for flag in ("image", "label", "keep"):
            value = getattr(self, flag)
            if value not in (None, ()):
                name = flag if flag == "keep" else f"{flag}_column"
                raise UserError(
                    f"{src} has no columns, which parquet and WebDataset have: leave out --{name}"
                )


def as_text(value: object) -> str:
    """Returns the text to store: strings as they are, "" for None, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
