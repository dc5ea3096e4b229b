"""Writing an export: beside its place, checked, and only then moved to it."""

import os
import shutil
import tempfile
from pathlib import Path

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


def write(weights: Weights, layout: Layout, dst: Path) -> tuple[Path, str]:
    """Writes weights and their card to `dst`; (file or directory, what the check says).

    Raises UserError, with nothing left, where the layout cannot hold them or computes otherwise.
    """
    target = formats.target(layout, dst)
    if layout.name == "flax" and (target / "checkpoints").exists():
        raise UserError(f"{target} has checkpoints: name another directory")
    folder = target.parent if layout.suffixes else target
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the file system of its place: a move, not a copy.
    near = folder if folder.is_dir() else folder.parent
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=near))
    try:
        written = staging / target.name if layout.suffixes else staging
        layout.save(weights, written)
        expected = parity.outputs(weights)
        verified = parity.check(layout.name, written, weights, expected)
        arrays = written if layout.suffixes else staging / "model.safetensors"
        text = card.text(weights, layout.name, target, arrays, verified=verified)
        (staging / card_name(target, layout)).write_text(text)
        folder.mkdir(parents=True, exist_ok=True)
        for made in staging.iterdir():
            os.replace(made, folder / made.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target, verified


def card_name(target: Path, layout: Layout) -> str:
    """README.md; where one lies there that is not this export's card, a name after the export."""
    readme = (target.parent if layout.suffixes else target) / "README.md"
    if readme.is_file() and not readme.read_text().startswith(card.mark(target)):
        return f"{target.name}.md"
    return readme.name
