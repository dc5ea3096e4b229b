"""Stored examples that cannot be used: an error, or named, counted and replaced by the next."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dgpt_jax import token_codec, views
from dgpt_jax.schema import UserError, printable

T = TypeVar("T")


class BadRecord(UserError):
    """One example that cannot be used; the line names its dataset, split, index and id."""


def bad_record(source, index: int, name: str, reason) -> BadRecord:
    """The error of an example; `name` is its id, "" where that cannot be read either. It may hold
    anything, and is not to move the terminal's cursor."""
    shown = printable(name) or "its id cannot be read"
    return BadRecord(f"{source}: example {index} ({shown}): {one_line(reason)}")


def one_line(reason) -> str:
    """What an error says, without the rest of its page."""
    return (str(reason).strip().split("\n") or [""])[0][:200] or type(reason).__name__


@contextlib.contextmanager
def named(source, index: int, record: dict):
    """A context in which the record's picture is decoded; raises BadRecord where it cannot be, or
    where the record's tokens are not finite."""
    if "tokens" in record and not token_codec.is_finite(record["tokens"]):
        raise bad_record(source, index, record["id"], "its tokens are not finite (NaN or Inf)")
    try:
        yield
    except views.Unreadable as e:
        raise bad_record(source, index, record["id"], e) from None


def picture(source, index: int, record: dict) -> np.ndarray:
    """The decoded image of a record. Raises BadRecord, as `named` does."""
    with named(source, index, record):
        return views.decode_picture(record["image"])


@dataclass
class Policy:
    """What becomes of bad records: `skip`, or an error. Skipped ones are fatal where they are more
    than the share `most` of the epochs that have begun.

    `read` and `bad` count what one process has taken from the stream; picklable.
    """

    skip: bool
    most: float
    length: int
    read: int = 0
    bad: int = 0
    _said: set[str] = field(default_factory=set)

    def first_good(self, load: Callable[[int], T], index: int) -> tuple[T, bool]:
        """load(i) for the first i from `index` on, round the end, that is good, and whether it is
        another: a function of what is stored, on whatever process and thread."""
        skipped = 0
        while True:
            try:
                return load((index + skipped) % self.length), skipped > 0
            except BadRecord as e:
                if not self.skip:
                    raise
                self._say(str(e))
                skipped += 1
                self._refuse(skipped, self.length)

    def count(self, replaced: np.ndarray):
        """Counts a batch; `replaced` (rows,): whether each example is another's replacement."""
        self.read += len(replaced)
        self.bad += int(replaced.sum())
        self._refuse(self.bad, -(-self.read // self.length) * self.length)

    def _say(self, error: str):
        """Once in each process, not once an epoch."""
        if error not in self._said:
            self._said.add(error)
            print(f"bad record, the next is taken: {error}", file=sys.stderr, flush=True)

    def _refuse(self, bad: int, of: int):
        if bad > self.most * of:
            raise UserError(
                f"{bad} bad records to {of} examples are more than the share {self.most:g} that "
                f"config.data.bad_most allows; they are named above: mend the dataset, or raise it"
            )
