"""Errors of Orbax and TensorStore: as UserError, and without the traces that repeat them."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

import jax

from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage.gcs import AnyPath

REMEDY = "Copy it again, or move that step's directory away to read the step before it"
# Prefixes of TensorStore's errors about access to the files rather than their content.
UNREACHABLE = re.compile(
    "UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
)
# In errors of writing, which are TensorStore's ValueError, various ones of Orbax, or OSError.
NO_SPACE = re.compile("RESOURCE_EXHAUSTED|No space left|quota exceeded")
NO_PERMISSION = re.compile("Read-only|Permission denied")


@contextlib.contextmanager
def translate_damage(item: AnyPath) -> Iterator[None]:
    """Context that turns Orbax's errors about truncated, changed or missing files into UserError,
    and those about unreachable files into another UserError."""
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        sys.unraisablehook = _without_late_operations
        logging.getLogger("asyncio").addFilter(_is_no_other_array)
        reason = one_line(e)
        missing = isinstance(e, (FileNotFoundError, NotADirectoryError))
        if (isinstance(e, OSError) and not missing) or UNREACHABLE.search(reason):
            raise UserError(f"{item} cannot be read: {reason}") from e
        raise UserError(f"{item} is damaged: {reason}. {REMEDY}") from e


def disk_problem(error: Exception) -> str:
    """Returns "no space left" or "no permission" for an error of writing, "" for any other."""
    if NO_SPACE.search(str(error)):
        return "no space left"
    return "no permission" if NO_PERMISSION.search(str(error)) else ""


def hide_repeated_errors() -> None:
    """Hides the traces that Orbax and TensorStore print of errors which are raised as well: from
    the threads that write arrays, and of other arrays' operations after one has failed."""
    logging.getLogger("absl").addFilter(_is_no_thread)
    sys.unraisablehook = _without_late_operations


def _is_no_thread(record: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


def _is_no_other_array(record: logging.LogRecord) -> bool:
    """False for errors of further arrays: asyncio logs those that nobody has awaited."""
    return "exception was never retrieved" not in record.getMessage()


def _without_late_operations(unraisable, before=sys.unraisablehook):
    """A sys.unraisablehook that hides operations which end after the one that failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)
