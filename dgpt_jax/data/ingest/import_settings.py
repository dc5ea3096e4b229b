"""Settings of an import, kept beside its shards, so that only the same import is continued."""

import json
from pathlib import Path

from etils import epath

from dgpt_jax import user_images
from dgpt_jax.schema import UserError

FILE = "import.json"


def of(src, found, shard_size: int, options: user_images.Options) -> dict:
    """The settings of an import of image_files.Found, for JSON."""
    return {
        "source": str(Path(src).resolve()),
        "shard_size": shard_size,
        "images": {name: len(members) for name, members in found.splits.items()},
        "classes": len(found.classes),
        "files_digest": found.digest(),
        **_reading(options),
    }


def _reading(options: user_images.Options) -> dict:
    """How images are read, which earlier versions did not write."""
    return {
        "background": list(options.background),
        "range": options.range and list(options.range),
    }


def refuse_another(out: epath.Path, settings: dict):
    """Raises UserError where `out` holds anything but this import."""
    began = out / FILE
    if began.exists():
        before = _reading(user_images.DEFAULT) | json.loads(began.read_text())
        for key, now in settings.items():
            if before.get(key) != now:
                raise UserError(
                    f"{out} was begun with {key} {before.get(key)!r}, now it is {now!r}: repeat "
                    f"the first command, or choose another --out"
                )
    elif (out / "dataset_info.json").exists() or (
        out.exists() and any("array_record" in path.name for path in out.iterdir())
    ):
        raise UserError(f"{out} already holds a dataset: choose another --out")


def refuse_earlier_rules(out: epath.Path, receipts: dict):
    """Raises UserError where an earlier version, which did not composite transparent images, wrote
    a part of the shards that are to be completed."""
    if receipts and "background" not in json.loads((out / FILE).read_text()):
        raise UserError(
            f"{out} was begun by an earlier version, which read transparent and deep images "
            f"otherwise, and is not finished: choose another --out, or delete it"
        )


def write(out: epath.Path, settings: dict):
    """Writes the file at once, or not at all."""
    half = out / f".{FILE}.partial"
    half.write_text(json.dumps(settings, indent=1) + "\n")
    half.replace(out / FILE)
