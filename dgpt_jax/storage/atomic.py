"""Files that appear complete or not at all, on local disks and gs://, and JSON read back."""

import json
import os
from pathlib import Path

from etils import epath

from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import gcs


def write_text(path: gcs.AnyPath, text: str) -> None:
    """Writes a file, or replaces it, atomically. Raises UserError."""
    write_bytes(path, text.encode())


def write_bytes(path: gcs.AnyPath, data: bytes) -> None:
    """Writes a file, or replaces it, atomically: readers see the old content or the new one.

    A local file is written under a hidden name (`.NAME.PID.partial`), flushed to the disk and
    renamed; an object on gs:// appears complete anyway. Raises UserError, also on a full disk, and
    then keeps the old file.
    """
    with gcs.failures(f"{path} cannot be written"):
        if gcs.is_remote(path):
            epath.Path(path).write_bytes(data)
            return
        path = Path(path)
        partial = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: gcs.AnyPath, what: str) -> dict:
    """Returns the object in a JSON file. Raises UserError if it is missing, unreadable or damaged.

    what: the kind of file, for messages: "manifest".
    """
    with gcs.failures(f"{path} cannot be read"):
        try:
            data = epath.Path(path).read_bytes()
        except FileNotFoundError:
            raise UserError(f"no such file: {path} ({what})") from None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} {path} is damaged: {type(e).__name__}: {one_line(e)}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{what} {path} is damaged: TypeError: a JSON {type(content).__name__}, not an object"
        )
    return content
