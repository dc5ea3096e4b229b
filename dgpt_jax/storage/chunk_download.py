"""Download of a chunk of a remote file, with further tries after errors."""

import time
from collections.abc import Callable
from typing import Any

from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import gcs

# gcsfs itself tries six times if a server answers with a transient error.
TRIES = 4
FIRST_DELAY = 1.0  # seconds before the second try; doubles with each further one
STALLED = 120  # timeout in seconds of a request


def read(url: str, start: int, stop: int, check: Callable[[], None]) -> bytes:
    """Returns the bytes `start` to `stop` of a remote file.

    check: called before each try; what it raises ends the download. Raises UserError if all tries
    fail.
    """
    system, name = gcs.filesystem(url)
    options = {"timeout": STALLED} if system.async_impl else {}
    error: Exception | None = None
    for attempt in range(TRIES):
        check()
        if attempt:
            time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
        try:
            data: Any = system.cat_file(name, start, stop, **options)
            if len(data) == stop - start:
                return data
            error = OSError(f"received {len(data)} bytes instead of {stop - start}")
        except Exception as e:  # network errors have the types of many libraries
            error = e
    reason = f"{type(error).__name__}: {one_line(error)}"
    raise UserError(f"{url} cannot be fetched (tried {TRIES} times): {reason}")
