"""Errors that commands report as one line, and helpers for the text of messages."""

from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error that the user can fix.

    Commands print its message as one line, without a traceback, and exit with status 1.
    """


class ChoiceError(UserError):
    """A value that is not one of `allowed`."""

    def __init__(self, message: str, allowed: Iterable[Any]):
        super().__init__(message)
        self.allowed = tuple(allowed)


class MissingHeads(UserError):
    """Weights whose head counts neither they nor files beside them specify."""


class BadRecord(UserError):
    """An example that cannot be used. The message names its dataset, split, index and id."""


def bad_record(source: object, index: int, name: str, reason: object) -> BadRecord:
    """Returns the error of one example.

    source: the dataset and split. name: the example's id, "" if it cannot be read; its control
    characters are escaped.
    """
    shown = printable(name) or "its id cannot be read"
    return BadRecord(f"{source}: example {index} ({shown}): {one_line(reason)}")


def one_line(reason: object) -> str:
    """Returns the first line of an error's message, at most 200 characters, or its type's name."""
    return (str(reason).strip().split("\n") or [""])[0][:200] or type(reason).__name__


def printable(text: str) -> str:
    """Returns the text with control characters escaped, so that file names cannot control the
    terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns "1 image" or "2 images"; plural: default `noun` with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
