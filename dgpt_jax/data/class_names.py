"""Names of classes, compared where two datasets, or a dataset and a head, meet."""

from collections.abc import Sequence
from itertools import zip_longest


def first_difference(names: Sequence[str], expected: Sequence[str]) -> int | None:
    """The number of the first class that has two names; None where all agree.

    Names that are not known (empty), or are the classes' own numbers, fit any.
    """
    for some in (names, expected):
        if list(some) == [str(i) for i in range(len(some))]:
            return None
    pairs = enumerate(zip_longest(names, expected))
    return next((i for i, (name, other) in pairs if name != other), None)


def shown(names: Sequence[str], most: int = 8) -> str:
    """Their number and the first of them: "1000 classes (n01440764, n01443537, …)"."""
    return f"{len(names)} classes ({', '.join(names[:most])}{', …' if names[most:] else ''})"
