"""Bad records: stored examples that cannot be used raise, or are logged, counted and replaced."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dgpt_jax.data import image_ops, token_codec
from dgpt_jax.errors import BadRecord, UserError, bad_record, counted
from dgpt_jax.storage import tfds_dataset

T = TypeVar("T")


@contextlib.contextmanager
def decode_errors(source: tfds_dataset.Split, index: int, record: dict) -> Iterator[None]:
    """Context that decodes the image of a record. Raises BadRecord if its bytes are unreadable or
    its tokens are not finite."""
    if "tokens" in record and not token_codec.is_finite(record["tokens"]):
        raise bad_record(source, index, record["id"], "its tokens are not finite (NaN or Inf)")
    try:
        yield
    except image_ops.UnreadableImage as e:
        raise bad_record(source, index, record["id"], e) from None


def decode_image(source: tfds_dataset.Split, index: int, record: dict) -> np.ndarray:
    """Returns the decoded image of a record. Raises BadRecord, as `decode_errors` does."""
    with decode_errors(source, index, record):
        return image_ops.decode_image(record["image"])


@dataclass
class Policy:
    """Treatment of bad records: replaced if `skip`, else an error. Replaced ones are fatal once
    they exceed the fraction `max_fraction` of the epochs begun so far.

    length: examples in the dataset. `read` and `bad` count the examples and the bad records of this
    process. Picklable.
    """

    skip: bool
    max_fraction: float
    length: int
    read: int = 0
    bad: int = 0
    _warned: set[str] = field(default_factory=set)

    def load_or_replace(self, load: Callable[[int], T], index: int) -> tuple[T, bool]:
        """Returns (load(i), i != index) for the first good i from `index` on, wrapping around: the
        same on any process and thread."""
        skipped = 0
        while True:
            try:
                return load((index + skipped) % self.length), skipped > 0
            except BadRecord as e:
                if not self.skip:
                    raise
                self._warn_once(str(e))
                skipped += 1
                self._check(skipped, self.length)

    def count(self, replaced: np.ndarray):
        """Counts a batch; replaced: bool (rows,), True for replacements."""
        self.read += len(replaced)
        self.bad += int(replaced.sum())
        self._check(self.bad, -(-self.read // self.length) * self.length)

    def _warn_once(self, error: str):
        """Prints an error once per process, not once per epoch."""
        if error not in self._warned:
            self._warned.add(error)
            print(f"bad record, replaced by the next: {error}", file=sys.stderr, flush=True)

    def _check(self, bad: int, examples: int):
        if bad > self.max_fraction * examples:
            raise UserError(
                f"{counted(bad, 'bad record')} in {counted(examples, 'example')}, more than "
                f"config.data.max_bad_fraction={self.max_fraction:g}, see above: fix the dataset, "
                f"or raise the limit"
            )
