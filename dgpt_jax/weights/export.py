"""Writing an export: beside its place, checked, and only then moved to it."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from dgpt_jax import outputs
from dgpt_jax.convert import card, formats, parity
from dgpt_jax.convert.weights import Layout, Weights, encoder
from dgpt_jax.schema import UserError


def prepare(weights: Weights, layout: Layout, part: str | None, pooling: str | None) -> Weights:
    """The part of the weights that a layout is to hold: "encoder", "full" or what it can hold."""
    if part == "full" and not layout.full:
        raise UserError(f"layout {layout.name} holds an encoder only: --part=encoder")
    if not weights.full and (part == "full" or layout.name == "digpt"):
        raise UserError(f"{weights.source} holds an encoder without decoders")
    if part == "encoder" and layout.name == "digpt":
        raise UserError("the official layout holds encoder and decoders: --part=full")
    if weights.full and layout.full and part != "encoder":
        if pooling:
            raise UserError("--pooling is for encoders: --part=encoder")
        return weights
    usual = "mean" if layout.name == "timm" else "cls"
    return encoder(weights, pooling or (usual if weights.full else None))


def write(
    weights: Weights, layout: Layout, dst: Path, *, release: bool = False
) -> tuple[Path, str]:
    """Writes weights and their card to `dst`; (file or directory, what the check says).

    release: lets go of the arrays before what was written is read for the check, which so needs no
    memory of its own; `weights.params` has shapes (jax.ShapeDtypeStruct) in their places then.
    Raises UserError, with nothing left, where the layout cannot hold them or computes otherwise,
    where weights lie there already, are not finite, and where the disk does not take them.
    """
    for name, array in weights.params.items():
        if bad := array.size - np.count_nonzero(np.isfinite(array)):
            raise UserError(
                f"{weights.source}: {name} has {bad} values that are not finite: take an earlier "
                f"checkpoint"
            )
    target, folder = refuse_taken(layout, dst)
    near = next(path for path in (folder, *folder.parents) if path.exists())
    if not near.is_dir():
        raise UserError(f"{near} is a file, {target} needs a directory there")
    size, space = sum(x.nbytes for x in weights.params.values()), shutil.disk_usage(near).free
    if space < size:
        raise UserError(f"{dst} needs {size / 1e6:.1f} MB, its disk has {space / 1e6:.1f} MB left")
    with _writing(dst):  # on the file system of its place: a move, not a copy
        scratch = tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=near, ignore_cleanup_errors=True
        )
    with scratch:
        staging = Path(scratch.name) / "export"
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
            _move(staging, folder, last=arrays.name)
    return target, verified


def check_place(layout: Layout, dst: Path):
    """Raises UserError, before anything is read, where `write` would not be able to write."""
    (outputs.file if layout.suffixes else outputs.directory)(formats.target(layout, dst))
    refuse_taken(layout, dst)


def refuse_taken(layout: Layout, dst: Path) -> tuple[Path, Path]:
    """(the file or directory that an export is, its directory). Raises UserError where weights
    would be written over."""
    target = formats.target(layout, dst)
    if layout.suffixes:
        folder, taken = target.parent, [target]
    else:
        folder, taken = target, [target / name for name in (*formats.FILES, "checkpoints")]
    for path in taken:
        if path.exists():
            raise UserError(f"{path} is there already: name another place, or remove it")
    return target, folder


def _release(weights: Weights):
    for path, array in weights.params.items():
        weights.params[path] = jax.ShapeDtypeStruct(array.shape, array.dtype)


@contextlib.contextmanager
def _writing(dst: Path):
    """What the system refuses is the user's to mend."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{dst} cannot be written: {e.strerror or e}") from e


def _move(staging: Path, folder: Path, *, last: str):
    """All of it to a new directory at once; else file by file, the weights at the end."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, folder)
        return
    for made in sorted(staging.iterdir(), key=lambda path: path.name == last):
        os.replace(made, folder / made.name)


def card_name(target: Path, layout: Layout) -> str:
    """README.md; where one lies there that is not this export's card, a name after the export."""
    readme = (target.parent if layout.suffixes else target) / "README.md"
    if readme.is_file() and not readme.read_bytes().startswith(card.mark(target).encode()):
        return f"{target.name}.md"
    return readme.name
