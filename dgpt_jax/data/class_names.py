"""Comparison of the class names of two datasets, or of a dataset and a classifier."""

from collections.abc import Sequence
from itertools import zip_longest

from dgpt_jax.errors import counted


def first_difference(names: Sequence[str], expected: Sequence[str]) -> int | None:
    """Returns the first class whose names differ, or None.

    An empty list, or one of the numbers 0, 1, …, matches any names.
    """
    for candidate in (names, expected):
        if list(candidate) == [str(i) for i in range(len(candidate))]:
            return None
    pairs = enumerate(zip_longest(names, expected))
    return next((i for i, (name, other) in pairs if name != other), None)


def summary(names: Sequence[str], most: int = 8) -> str:
    """Returns the number of names and the first few: "1000 classes (n01440764, n01443537, …)"."""
    number = counted(len(names), "class", "classes")
    return f"{number} ({', '.join(names[:most])}{', …' if names[most:] else ''})"
