"""Access to a parquet file through pyarrow, local or remote."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from dgpt_jax.data.ingest.image_index import text
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import byte_ranges

BUFFER = 1 << 20  # bytes of a column that are read at once


@contextlib.contextmanager
def open_file(path: bytes) -> Iterator[tuple[Any, bytes]]:
    """Context with a pyarrow ParquetFile that reads its pages one by one, and the digest of the
    file's size and footer. Raises UserError if it cannot be read, or pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{text(path)} is read through pyarrow: pip install 'dgpt_jax[parquet]'"
        ) from None
    with _errors(path), byte_ranges.open_file(path) as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(8)[:4], "little")
        file.seek(max(size - 8 - length, 0))
        digest = hashlib.blake2b(b"%d" % size + file.read(length), digest_size=16).digest()
        file.seek(0)
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        yield parquet, digest


@contextlib.contextmanager
def _errors(path: bytes) -> Iterator[None]:
    """Context that turns errors of pyarrow about a file into UserError."""
    try:
        yield
    except (OSError, ValueError) as e:  # pyarrow's types are subclasses
        reason = getattr(e, "strerror", None) or one_line(e)
        raise UserError(
            f"{text(path)} is not parquet, or is damaged or cut off: {reason}: copy or download it "
            f"again"
        ) from None


def compressed_bytes(file: Any, column: str) -> int:
    """Returns the compressed bytes of a column of a ParquetFile, at least 1."""
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema == column) or 1
