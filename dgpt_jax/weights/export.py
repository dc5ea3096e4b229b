"""Exports: written to a temporary directory, checked, then moved into place."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import disk_space, output_paths, scratch_dir
from dgpt_jax.weights import card, parity, registry
from dgpt_jax.weights.types import WeightLayout, Weights, encoder


def prepare(
    weights: Weights, layout: WeightLayout, part: str | None, pooling: str | None
) -> Weights:
    """Selects what to export: part "encoder", "full" or, if None, all that the layout can store.

    Raises UserError if the layout or the weights do not allow it.
    """
    if part == "full" and not layout.full:
        raise UserError(f"layout {layout.name} stores only encoders: use --part=encoder")
    if not weights.full and (part == "full" or layout.name == "digpt"):
        raise UserError(f"{weights.source} is an encoder without decoders")
    if part == "encoder" and layout.name == "digpt":
        raise UserError("the official layout stores encoder and decoders: use --part=full")
    if weights.full and layout.full and part != "encoder":
        if pooling:
            raise UserError("--pooling is for encoders: use --part=encoder")
        return weights
    default = "mean" if layout.name == "timm" else "cls"
    return encoder(weights, pooling or (default if weights.full else None))


def write(
    weights: Weights, layout: WeightLayout, dst: Path, *, release: bool = False
) -> tuple[Path, str]:
    """Writes weights and their card to `dst`; returns (file or directory, result of the check).

    release: frees the arrays before the check reads the export, which then needs no extra memory;
    `weights.params` then contains jax.ShapeDtypeStruct. Raises UserError, and leaves no files,
    if the layout cannot represent the weights or the export computes other values, if weights exist
    there or are not finite, and if the disk is full.
    """
    assert layout.save is not None
    for name, array in weights.params.items():
        if count := array.size - np.count_nonzero(np.isfinite(array)):
            raise UserError(
                f"{weights.source}: {name} has {counted(int(count), 'non-finite value')}: use an "
                f"earlier checkpoint"
            )
    target, directory = refuse_existing(layout, dst)
    parent = next(path for path in (directory, *directory.parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"{parent} is a file, but {target} needs a directory there")
    needed = sum(x.nbytes for x in weights.params.values())
    disk_space.require(dst, needed, "free some, or write to another disk")
    with _writing(dst):  # on the same file system, to be moved, not copied
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    with scratch_dir.removed(scratch):
        staging = scratch / "export"
        written = staging / target.name if layout.suffixes else staging
        with _writing(dst):
            staging.mkdir()
            layout.save(weights, written)
        expected = parity.outputs(weights)
        if release:
            _release(weights)
        verified = parity.check(layout.name, written, weights, expected)
        arrays = written if layout.suffixes else staging / "model.safetensors"
        text = card.text(weights, layout.name, target, arrays, verified=verified)
        with _writing(dst):
            (staging / card_name(target, layout)).write_text(text, encoding="utf-8")
            _move(staging, directory, last=arrays.name)
    return target, verified


def check_target(layout: WeightLayout, dst: Path) -> None:
    """Raises UserError, before anything is read, if `write` could not write to `dst`."""
    (output_paths.file if layout.suffixes else output_paths.directory)(registry.target(layout, dst))
    refuse_existing(layout, dst)


def refuse_existing(layout: WeightLayout, dst: Path) -> tuple[Path, Path]:
    """Returns (file or directory of an export, its directory). Raises UserError if weights exist
    there."""
    target = registry.target(layout, dst)
    if layout.suffixes:
        directory, paths = target.parent, [target]
    else:
        directory, paths = target, [target / name for name in (*registry.FILES, "checkpoints")]
    for path in paths:
        if path.exists():
            raise UserError(f"{path} already exists: choose another path, or remove it")
    return target, directory


def _release(weights: Weights) -> None:
    for path, array in weights.params.items():
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
        weights.params[path] = shape  # pyright: ignore[reportArgumentType]  # only shapes are read


@contextlib.contextmanager
def _writing(dst: Path) -> Iterator[None]:
    """Turns OSError into UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{dst} cannot be written: {e.strerror or e}") from e


def _move(staging: Path, directory: Path, *, last: str) -> None:
    """Moves all files at once to a new directory; to an existing one file by file, weights last."""
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, directory)
        return
    for file in sorted(staging.iterdir(), key=lambda path: path.name == last):
        os.replace(file, directory / file.name)


def card_name(target: Path, layout: WeightLayout) -> str:
    """README.md; a name after the export if a README.md exists that is not this export's card."""
    readme = (target.parent if layout.suffixes else target) / "README.md"
    if readme.is_file() and not readme.read_bytes().startswith(card.mark(target).encode()):
        return f"{target.name}.md"
    return readme.name
