"""Selections of examples of a token store: by id, by a hash of the id, or by label."""

import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from dgpt_jax.errors import UserError, counted, printable
from dgpt_jax.storage import gcs
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.tokens.store_parts import KEY, Index, SourceStore, key_of

SHOWN = 3  # ids in a message


def some(names: Sequence[str]) -> str:
    """Returns the first few names, for a message."""
    return ", ".join(map(printable, names[:SHOWN])) + ", …" * (len(names) > SHOWN)


def fractions(index: Index, seed: int) -> np.ndarray:
    """Returns a uniform number in [0, 1) per example, (n,) float64: a function of its id and the
    seed, so that it does not change when the store grows."""
    salt = hashlib.blake2b(str(seed).encode()).digest()
    hashes = bytearray()  # joined one by one: a list of them would take 60 bytes each
    for key in index.keys:
        hashes += hashlib.blake2b(key, digest_size=8, key=salt).digest()
    return (np.frombuffer(hashes, "<u8") >> np.uint64(11)) * 2.0**-53


def by_fraction(index: Index, fraction: float, seed: int) -> np.ndarray:
    """Returns the rows, (m,) int64, of about `fraction` of the examples; a smaller fraction with
    the same seed selects some of them."""
    return np.flatnonzero(fractions(index, seed) < fraction)


def by_count(index: Index, count: int, seed: int) -> np.ndarray:
    """Returns the rows of exactly `count` examples, those of the smallest `fractions`. Raises
    UserError if there are fewer."""
    if count > len(index.keys):
        raise UserError(
            f"--count={count}: the store has {counted(len(index.keys), 'example')}: choose a "
            f"smaller number"
        )
    return np.sort(np.argsort(fractions(index, seed), kind="stable")[:count])


def by_labels(store: SourceStore, index: Index, labels: str) -> np.ndarray:
    """Returns the rows of the examples of some classes.

    labels: names or numbers of classes, separated by commas. Raises UserError.
    """
    names = store.class_names
    if names is None:
        raise UserError(f"{store.path} has no labels: select by --ids, --fraction or --count")
    numbers = {name: i for i, name in enumerate(names)}
    words = [labels] if labels in numbers else labels.split(",")
    classes = set()
    for word in words:
        if word in numbers:
            classes.add(numbers[word])
        elif word.isascii() and word.isdigit() and int(word) < len(names):
            classes.add(int(word))
        else:
            raise UserError(
                f"--labels: {word!r} is none of {store.path}'s "
                f"{counted(len(names), 'class', 'classes')} ({some(names)})"
            )
    return np.flatnonzero(np.isin(index.labels, sorted(classes)))


def by_ids(store: SourceStore, index: Index, path: AnyPath) -> np.ndarray:
    """Returns the rows of the examples whose ids are lines of a file. Raises UserError if one is
    not in the store."""
    keys = _read_keys(path)
    absent = np.flatnonzero(~np.isin(keys, index.keys))
    if len(absent):
        lines = [line.decode(errors="replace") for line in _lines(path, set(absent[:4].tolist()))]
        raise UserError(
            f"{path}: {len(absent)} of {counted(len(keys), 'id')} not in {store.path}: "
            f"{some(lines)}: remove them from the file"
        )
    return np.flatnonzero(np.isin(index.keys, keys))


def _read_keys(path: AnyPath) -> np.ndarray:
    """Returns the keys of the ids in a file, one per line; 16 bytes each. Raises UserError."""
    keys = bytearray()
    for line in _lines(path):
        keys += key_of(line)
    if not keys:
        raise UserError(f"{path} holds no ids: write one per line")
    return np.frombuffer(bytes(keys), KEY)


def _lines(path: AnyPath, numbers: set[int] | None = None):
    """Yields the lines of a file that are not empty; only those of `numbers`, counted from 0."""
    number = -1
    with gcs.failures(f"{path} cannot be read"), epath.Path(path).open("rb") as file:
        for line in file:
            if line := line.rstrip(b"\r\n"):
                number += 1
                if numbers is None or number in numbers:
                    yield line
