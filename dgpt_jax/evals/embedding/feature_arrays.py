"""Features as one array per split: .npy, or safetensors."""

import io
import json
import os
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.evals.embedding.feature_batches import Batch, Row
from dgpt_jax.evals.embedding.feature_outputs import Shard, disk_errors
from dgpt_jax.evals.embedding.feature_store import FeatureInfo

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of safetensors
MAX_ROWS = 10**15  # for which a safetensors header has room


class ArrayOutput:
    """SPLIT.npy or SPLIT.safetensors, written row after row behind a header of fixed size, and
    SPLIT.jsonl with id, label and texts of each row; labels also as an array."""

    def __init__(self, directory: Path, info: FeatureInfo):
        self._directory, self._info = directory, info
        self._sizes: dict[str, int] = {}

    def restore(self, sizes: Mapping[str, int]) -> set[str]:
        self._sizes = dict(sizes)
        for name, size in sizes.items():
            path = self._directory / name
            actual = path.stat().st_size if path.exists() else 0
            if actual < size:
                raise UserError(
                    f"{path} has {actual} bytes, {size} were written: it was changed: delete "
                    f"{self._directory} and run the command again"
                )
        return set()

    def write(self, shard: Shard, batches: Iterable[Batch]) -> dict[str, int]:
        paths = [self._directory / name for name in self._names(shard.split)]
        with (
            disk_errors(paths[0]),
            self._open(paths[0]) as data,
            self._open(paths[1]) as lines,
        ):
            if not data.tell():
                data.write(self._header(0))
            for batch in batches:
                data.write(_bytes(batch.features))
                text = "".join(map(self._line, batch.rows))
                lines.write(text.encode("utf-8", "backslashreplace"))  # valid JSON escapes
            for path, file in zip(paths, (data, lines), strict=True):
                _flush(file)
                self._sizes[path.name] = file.tell()
        return {path.name: self._sizes[path.name] for path in paths}

    def finish(self, rows: Mapping[str, int]) -> dict[str, int]:
        sizes = {}
        for split, count in rows.items():
            name, lines = (self._directory / name for name in self._names(split))
            with disk_errors(name), self._open(name) as file:
                labels = self._labels(lines) if self._info.classes else None
                if labels is not None and self._info.to == "safetensors":
                    file.write(labels.data)
                elif labels is not None:
                    sizes |= self._write_labels(split, labels)
                file.seek(0)
                file.write(self._header(count))
                _flush(file)
            sizes |= {path.name: path.stat().st_size for path in (name, lines)}
        return sizes

    def _names(self, split: str) -> tuple[str, str]:
        return f"{split}.{self._info.to}", f"{split}.jsonl"

    def _open(self, path: Path) -> IO[bytes]:
        """Opens a file at its end after the last complete shard; what follows is cut off."""
        size = self._sizes.get(path.name, 0)
        file = path.open("r+b" if size else "wb")
        file.truncate(size)
        file.seek(size)
        return file

    def _line(self, row: Row) -> str:
        values = {"id": row.id, **({"label": row.label} if self._info.classes else {})}
        return json.dumps(values | row.texts, ensure_ascii=False) + "\n"

    def _labels(self, path: Path) -> np.ndarray:
        labels = array("i")
        with path.open("rb") as file:
            labels.extend(json.loads(line)["label"] for line in file)
        return np.asarray(labels, np.int32)

    def _write_labels(self, split: str, labels: np.ndarray) -> dict[str, int]:
        path = self._directory / f"{split}.labels.npy"
        np.save(path, labels)
        return {path.name: path.stat().st_size}

    def _header(self, rows: int) -> bytes:
        """Returns the header of a file of `rows` examples; its size does not depend on them."""
        shape = (rows, *self._info.shape)
        if self._info.to == "npy":
            buffer = io.BytesIO()
            descr = np.lib.format.dtype_to_descr(np.dtype(self._info.dtype))
            fields = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(buffer, fields)
            return buffer.getvalue()
        room = len(self._safetensors_header(MAX_ROWS))
        text = self._safetensors_header(rows).ljust(-(-room // 8) * 8)
        return len(text).to_bytes(8, "little") + text

    def _safetensors_header(self, rows: int) -> bytes:
        info, end = self._info, rows * self._info.row_bytes
        kind, shape = KINDS[info.dtype], [rows, *info.shape]
        header: dict[str, Any] = {
            "__metadata__": {
                "encoder": info.encoder["source"],
                "encoder_hash": info.encoder["hash"],
                "tokens": info.tokens,
                "preprocessing": json.dumps(info.preprocessing),
            },
            "features": {"dtype": kind, "shape": shape, "data_offsets": [0, end]},
        }
        if info.classes:
            span = [end, end + 4 * rows]
            header["labels"] = {"dtype": "I32", "shape": [rows], "data_offsets": span}
        return json.dumps(header).encode()


def _flush(file: IO[bytes]):
    file.flush()
    os.fsync(file.fileno())


def _bytes(values: np.ndarray) -> memoryview:
    """Returns the bytes of an array in C order; NumPy exports no buffer of bfloat16."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
