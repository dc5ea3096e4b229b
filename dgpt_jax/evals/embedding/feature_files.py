"""Features as files that are written whole: parquet shards, and feature stores."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.config import check_choice
from dgpt_jax.errors import UserError
from dgpt_jax.evals.embedding import feature_store
from dgpt_jax.evals.embedding.feature_arrays import ArrayOutput
from dgpt_jax.evals.embedding.feature_batches import Batch
from dgpt_jax.evals.embedding.feature_outputs import Output, Shard, damaged, disk_errors
from dgpt_jax.evals.embedding.feature_store import FeatureInfo
from dgpt_jax.storage import array_record_shards, tfds_dataset

ROW_GROUP = 32 << 20  # bytes of features in a row group of parquet


def open_output(directory: Path, info: FeatureInfo) -> Output:
    """Returns the output of `info.to`."""
    if info.to == feature_store.STORE:
        return StoreOutput(directory, info)
    if info.to == "parquet":
        return ParquetOutput(directory, info)
    return ArrayOutput(directory, info)


def check_format(to: str, tokens: str, dtype: str) -> None:
    """Raises UserError on unknown values, and if a format has no such dtype or its package is not
    installed."""
    check_choice("--to", to, feature_store.FORMATS)
    check_choice("--tokens", tokens, feature_store.TOKENS)
    check_choice("--dtype", dtype, feature_store.DTYPES)
    if dtype == "bfloat16" and to in ("npy", "parquet"):
        raise UserError(
            f"--dtype=bfloat16: {to} has no such type: use float16, or --to=safetensors or "
            f"--to={feature_store.STORE}"
        )
    if to == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(
                "--to=parquet is written through pyarrow: pip install 'dgpt_jax[parquet]'"
            ) from None


class ParquetOutput:
    """SPLIT-00000-of-00079.parquet: id, label, text columns, and features as lists of fixed size;
    the metadata under the key dgpt_jax of the schema."""

    def __init__(self, directory: Path, info: FeatureInfo):
        import pyarrow as pa

        self._directory, self._info, self._pa = directory, info, pa
        columns = [("id", pa.string())]
        if info.classes:
            columns.append(("label", pa.int32()))
        columns += [(name, pa.string()) for name in info.texts]
        kind = pa.type_for_alias(info.dtype.replace("float16", "halffloat"))
        for size in reversed(info.shape):
            kind = pa.list_(kind, size)
        metadata = {"dgpt_jax": json.dumps(info.to_json(), ensure_ascii=False)}
        self._schema = pa.schema([*columns, ("features", kind)], metadata)

    def restore(self, sizes: Mapping[str, int]) -> set[str]:
        return damaged(self._directory, sizes)

    def write(self, shard: Shard, batches: Iterable[Batch]) -> dict[str, int]:
        import pyarrow.parquet

        path = self._directory / (f"{shard.split}-{shard.number:05d}-of-{shard.count:05d}.parquet")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with disk_errors(path):
                with pyarrow.parquet.ParquetWriter(
                    partial, self._schema, use_dictionary=False, compression="zstd"
                ) as writer:
                    for rows, features in self._row_groups(batches):
                        writer.write_table(self._table(rows, features))
                with partial.open("r+b") as file:
                    os.fsync(file.fileno())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return {path.name: path.stat().st_size}

    def finish(self, rows: Mapping[str, int]) -> dict[str, int]:
        paths = self._directory.glob("*.parquet")
        return {path.name: path.stat().st_size for path in sorted(paths)}

    def _row_groups(self, batches: Iterable[Batch]) -> Iterator[tuple[list, np.ndarray]]:
        rows, parts = [], []
        for batch in batches:
            rows += batch.rows
            parts.append(batch.features)
            if sum(part.nbytes for part in parts) >= ROW_GROUP:
                yield rows, np.concatenate(parts)
                rows, parts = [], []
        if rows:
            yield rows, np.concatenate(parts)

    def _table(self, rows: Sequence, features: np.ndarray) -> Any:
        pa, info = self._pa, self._info
        column: Any = pa.array(features.reshape(-1))
        for size in reversed(info.shape):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        columns = [pa.array([row.id for row in rows], pa.string())]
        if info.classes:
            columns.append(pa.array([row.label for row in rows], pa.int32()))
        columns += [pa.array([r.texts[name] for r in rows], pa.string()) for name in info.texts]
        return pa.table([*columns, column], schema=self._schema)


class StoreOutput:
    """A feature store: ArrayRecord shards and TFDS's metadata (feature_store)."""

    def __init__(self, directory: Path, info: FeatureInfo):
        self._directory, self._info = directory, info
        self._features = feature_store.features(info)
        self._serialize = tfds_dataset.serializer(self._features)

    def restore(self, sizes: Mapping[str, int]) -> set[str]:
        return damaged(self._directory, sizes)

    def write(self, shard: Shard, batches: Iterable[Batch]) -> dict[str, int]:
        path = self._path(shard)
        with disk_errors(Path(path)):
            info = array_record_shards.write(path, self._records(batches))
        return {path.name: info.bytes}

    def finish(self, rows: Mapping[str, int]) -> dict[str, int]:
        infos = array_record_shards.shard_infos(self._directory)
        splits = {}
        for split, images in self._info.source["images"].items():
            count = math.ceil(images / self._info.shard_size)
            shards = [self._path(Shard(split, i, count)).name for i in range(count)]
            splits[split] = [infos[name] for name in shards]
        with disk_errors(self._directory):
            tfds_dataset.write_metadata(self._directory, self._features, splits, self._info.name)
        array_record_shards.write_manifest(self._directory, infos)
        return {name: info.bytes for name, info in sorted(infos.items())}

    def _path(self, shard: Shard):
        return tfds_dataset.shard_path(
            self._directory, shard.split, shard.number, shard.count, self._info.name
        )

    def _records(self, batches: Iterable[Batch]) -> Iterator[bytes]:
        for batch in batches:
            for row, features in zip(batch.rows, batch.features, strict=True):
                example = {**row.texts, "id": row.id, "features": features}
                if self._info.classes:
                    example["label"] = row.label
                yield self._serialize(example)
