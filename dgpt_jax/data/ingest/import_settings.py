"""Settings of an import, stored next to its shards, so that only the same import is resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from dgpt_jax.data.ingest import user_images
from dgpt_jax.data.ingest.discovery import Discovered
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.errors import UserError
from dgpt_jax.storage import atomic, gcs

FILE = "import.json"


def describe(
    src: Path | str,
    images: Discovered,
    shard_size: int,
    options: user_images.Options,
    columns: Columns,
) -> dict:
    """Returns the settings of an import as JSON."""
    return {
        "source": _absolute(str(src)),
        "shard_size": shard_size,
        "images": {name: len(split) for name, split in images.splits.items()},
        "classes": len(images.classes),
        "files_digest": images.digest(),
        **_decoding(options),
        **_columns(columns),
    }


def _absolute(src: str) -> str:
    """Returns a source as an absolute path; URLs as they are."""
    return src if gcs.is_remote(src) else str(Path(src).resolve())


def _decoding(options: user_images.Options) -> dict:
    """Decoding options; absent from files of earlier versions."""
    return {
        "background": list(options.background),
        "range": options.range and list(options.range),
    }


def _columns(columns: Columns) -> dict:
    """Columns of parquet or WebDataset; None, as in files of earlier versions, if by default."""
    return {
        "image_column": columns.image,
        "label_column": columns.label,
        "keep": list(columns.keep) or None,
    }


def check_same_import(out: epath.Path, settings: dict):
    """Raises UserError if `out` contains anything but this import."""
    file = out / FILE
    if file.exists():
        saved = _decoding(user_images.DEFAULT) | atomic.read_json(file, "import settings")
        for key, value in settings.items():
            if saved.get(key) != value:
                raise UserError(
                    f"{out} was started with {_difference(key, saved.get(key), value)}: repeat the "
                    f"first command, or choose another --out"
                )
    elif (out / "dataset_info.json").exists() or (
        out.exists() and any("array_record" in path.name for path in out.iterdir())
    ):
        raise UserError(f"{out} already contains a dataset: choose another --out")


def _difference(key: str, saved: Any, value: Any) -> str:
    """Describes a setting that differs by the flag that sets it, if there is one."""
    if key == "files_digest":
        return "other names or sizes of files, or other labels (--labels)"
    if key == "classes":
        return f"{saved} classes, not {value} (class folders, or --labels)"
    if key == "images" and isinstance(saved, dict) and saved.keys() != value.keys():
        return f"splits {', '.join(saved)}, not {', '.join(value)} (split folders, or --split)"
    flag = key if key in ("source", "images") else f"--{key}"
    return f"{flag} {saved!r}, not {value!r}"


def check_decoding_version(out: epath.Path, shard_infos: Mapping):
    """Raises UserError if some shards are by an earlier version, which did not composite
    transparent images."""
    if shard_infos and "background" not in atomic.read_json(out / FILE, "import settings"):
        raise UserError(
            f"{out} was started by an earlier version, which decoded transparent and deep images "
            f"differently, and is unfinished: choose another --out, or delete it"
        )


def write(out: epath.Path, settings: dict):
    """Writes the file atomically."""
    atomic.write_text(out / FILE, json.dumps(settings, indent=1) + "\n")
