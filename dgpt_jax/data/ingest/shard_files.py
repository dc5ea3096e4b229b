"""Sources that are many shards: brace patterns, and splits that are told by file names."""

import itertools
import os
import posixpath
import re
from collections.abc import Iterable

from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.errors import UserError
from dgpt_jax.storage import gcs, remote_listing

SPLITS = ("train", "val", "valid", "validation", "test")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
OF = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")
MAX_FILES = 1_000_000


def is_pattern(src: str) -> bool:
    """True if a source has braces and does not exist itself."""
    return bool(BRACES.search(src)) and (gcs.is_remote(src) or not os.path.exists(src))


def root(src: str, files: list[bytes]) -> bytes:
    """Returns the folder below which names of files and folders tell the split: the source, or the
    folder that holds the file or the pattern."""
    if is_pattern(src):
        return os.fsencode(posixpath.dirname(src[: src.index("{")]))
    path = os.fsencode(src.rstrip("/"))
    return posixpath.dirname(path) if files == [path] else path


def expand(src: str) -> list[bytes] | None:
    """Returns the files of a pattern as bash expands it, "shards/{000..127}.tar"; None if `src` has
    no braces or exists itself. Raises UserError if a file is missing."""
    if not is_pattern(src):
        return None
    names = list(itertools.islice(_expand(src, src), MAX_FILES + 1))
    if len(names) > MAX_FILES:
        raise UserError(f"{src} stands for more than {MAX_FILES} files")
    missing = _missing(names)
    if len(missing) == len(names):
        raise UserError(f"{src} matches no file; the first would be {names[0]}")
    if missing:
        raise UserError(f"{missing[0]} and {len(missing) - 1} other files of {src} are missing")
    return [os.fsencode(name) for name in names]


def _expand(pattern: str, src: str):
    match = BRACES.search(pattern)
    if not match:
        yield pattern
        return
    if numbers := RANGE.fullmatch(match[1]):
        low, high = numbers.groups()
        width = max(len(low), len(high)) if low[0] == "0" or high[0] == "0" else 0
        items: Iterable[str] = (f"{i:0{width}d}" for i in range(int(low), int(high) + 1))
        if int(low) > int(high):
            raise UserError(f"{src}: {match[0]} counts down, so that it has no files")
    elif "," in match[1]:
        items = match[1].split(",")
    else:
        raise UserError(f"{src}: {match[0]} is neither a range, {{000..127}}, nor a list, {{a,b}}")
    for item in items:
        yield from _expand(pattern[: match.start()] + item + pattern[match.end() :], src)


def _missing(names: list[str]) -> list[str]:
    """Returns the files that do not exist; remote folders are listed once, rather than asked for
    each file."""
    if not gcs.is_remote(names[0]):
        return [name for name in names if not os.path.isfile(name)]
    folders = {posixpath.dirname(name) for name in names}
    present = {f"{folder}/{name}" for folder in folders for name, _ in remote_listing.files(folder)}
    return [name for name in names if name not in present]


def divide(files: Iterable[bytes], root: bytes, split: str | None) -> dict[str, list[bytes]]:
    """Returns {split: files, sorted}, from the names of files and of their folders below `root`.

    A word of a name that is one of SPLITS names the split: "train/0000.parquet",
    "imagenet-train-0000.tar". If none does, all are `split` or train. Raises UserError if some name
    none or several, or if a file of "-00003-of-00008" is missing.
    """
    splits: dict[str, list[bytes]] = {}
    for file in sorted(files):
        splits.setdefault(_split_of(file, root), []).append(file)
    unnamed = splits.get("", [])
    if len(splits) > 1 and unnamed:
        raise UserError(
            f"{text(unnamed[0])} names no split ({', '.join(SPLITS)}), while others beside it do: "
            f"move or rename it"
        )
    for group in splits.values():
        _check_complete(group)
    return {split or "train": unnamed} if unnamed else dict(sorted(splits.items()))


def _split_of(file: bytes, root: bytes) -> str:
    """Returns the split in the names of a file and its folders, the nearest first; "" if none."""
    below = text(file[len(root) :]) if file.startswith(root) else text(posixpath.basename(file))
    for name in reversed(below.strip("/").split("/")):
        words = dict.fromkeys(word for word in re.split(r"[^A-Za-z]+", name) if word in SPLITS)
        if len(words) > 1:
            raise UserError(f"{text(file)} names several splits, {' and '.join(words)}: rename it")
        if words:
            return next(iter(words))
    return ""


def _check_complete(files: list[bytes]):
    """Raises UserError if names say how many files there are, and some are missing."""
    counts: dict[tuple[str, str, int], set[int]] = {}
    for file in files:
        if match := OF.fullmatch(text(file)):
            key = match[1], match[4], int(match[3])
            counts.setdefault(key, set()).add(int(match[2]))
    for (before, after, count), numbers in counts.items():
        if missing := sorted(set(range(count)) - numbers):
            raise UserError(
                f"{before}{missing[0]:05d}-of-{count:05d}{after} is missing, and "
                f"{len(missing) - 1} more of {count}: download them"
            )
