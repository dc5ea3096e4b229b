"""Class labels from a column of integers or names: of parquet files, or of WebDataset samples."""

from array import array
from collections.abc import Sequence

import numpy as np

from dgpt_jax.data.ingest.labels import check_name
from dgpt_jax.errors import UserError

MAX_CLASSES = 1_000_000


class ColumnLabels:
    """Collects the labels of all splits; all are integers, or all are names.

    names: of the classes, if the source has them; integers are indices into them. Without, the
    integers from 0 to the largest are the names. None and -1 are no label. Raises UserError if a
    class name cannot be stored.
    """

    def __init__(self, names: Sequence[str] = ()):
        self._names = {name: i for i, name in enumerate(names)}
        if len(self._names) < len(names):
            twice = next(name for i, name in enumerate(names) if self._names[name] != i)
            raise UserError(f"two classes are named {twice!r}: rename one of them")
        self._name_numbers: dict[str, int] = {}
        self._largest = -1

    def number(self, value: object) -> int:
        """Returns the number of a label. Raises ValueError with the reason if it is none."""
        if value is None:
            return -1
        if isinstance(value, str):
            if self._names and value not in self._names:
                raise ValueError(f"label {value!r} is none of the {len(self._names)} classes")
            if self._largest >= 0:
                raise ValueError(f"label {value!r} is a name, others are integers")
            return self._name_numbers.setdefault(value, len(self._name_numbers))
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"label {value!r} is neither an integer nor a name")
        end = len(self._names) or MAX_CLASSES
        if not -1 <= value < end:
            raise ValueError(
                f"label {value} is out of range: it must be 0 to {end - 1}, or -1 for none"
            )
        if self._name_numbers:
            raise ValueError(f"label {value} is an integer, others are names")
        self._largest = max(self._largest, value)
        return value

    def classes(self) -> list[str]:
        """Returns the names of the classes, in order; none if no image has a label."""
        if self._names and (self._name_numbers or self._largest >= 0):
            names = list(self._names)
        else:
            names = sorted(self._name_numbers) or [str(i) for i in range(self._largest + 1)]
        for name in names:
            check_name(name)
        return names

    def renumber(self, labels: array) -> np.ndarray:
        """Returns the numbers of a split as indices into `classes()`, int32 (N,)."""
        numbers = np.array(labels, np.int32)
        if not self._name_numbers:
            return numbers
        rank = self._names or {name: i for i, name in enumerate(sorted(self._name_numbers))}
        lookup = [*(rank[name] for name in self._name_numbers), -1]  # the last is for -1
        return np.array(lookup, np.int32)[numbers]
