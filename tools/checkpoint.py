"""Looks into checkpoints and makes others of them, without an accelerator.

python tools/checkpoint.py inspect RUN                  arrays: shapes, shardings, bytes
python tools/checkpoint.py extract RUN FILE.safetensors parameters, without optimizer state
python tools/checkpoint.py average RUN DIR --last=3     the mean of the newest checkpoints
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from dgpt_jax import checkpoint, cli
from dgpt_jax.convert import card, export, formats, layout
from dgpt_jax.convert.weights import Weights
from dgpt_jax.schema import UserError


def inspect(path, step: int | None) -> list[str]:
    """A line for each array, and one with the sums."""
    rows = checkpoint.describe(path, step)
    lines = [f"{name}  {shape}  {kind}  {place}  {size}" for name, shape, kind, place, size in rows]
    sums = {
        part: sum(row[-1] for row in rows if row[0].startswith(part))
        for part in ("params", "opt_state")
    }
    told = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in sums.items())
    return ["name  shape  dtype  sharding  bytes", *lines, f"{len(rows)} arrays: {told}"]


def average(path, last: int) -> Weights:
    """The newest checkpoint's weights, with the mean of the parameters of the `last` newest."""
    steps = checkpoint.steps(path)[-last:]
    if len(steps) < last or last < 1:
        raise UserError(f"{path} has {len(steps)} checkpoints, not {last}")
    _, weights = formats.read(path)
    sums = {name: np.zeros(x.shape, np.float64) for name, x in weights.params.items()}
    for step in steps:
        params, _ = checkpoint.load_params(path, step)
        for name, leaf in layout.flatten(params).items():
            sums[name] += leaf
    params = {name: (total / last).astype(np.float32) for name, total in sums.items()}
    source = f"{path}, mean of the steps {', '.join(map(str, steps))}"
    run = {**weights.run, "averaged": steps}
    return dataclasses.replace(weights, params=params, source=source, run=run)


def main():
    made = cli.parser(__doc__)
    made.add_argument("action", choices=("inspect", "extract", "average"))
    made.add_argument("path", help="work directory")
    made.add_argument("dst", nargs="?", help="what extract and average write")
    made.add_argument("--last", type=int, default=2, help="average: checkpoints")
    made.add_argument("--step", type=int, help="inspect: which; default: the newest")
    args = made.parse_args()
    if (args.dst is None) != (args.action == "inspect"):
        made.error("extract and average write DST, inspect writes nothing")
    jax.config.update("jax_platforms", "cpu")
    if args.action == "inspect":
        print("\n".join(inspect(args.path, args.step)))
        print(f"next: python tools/convert.py {args.path} DIR --to=timm")
        return
    name = "safetensors" if args.action == "extract" else "flax"
    weights = average(args.path, args.last) if name == "flax" else formats.read(args.path)[1]
    path, verified = export.write(weights, formats.LAYOUTS[name], Path(args.dst))
    print(f"wrote {path}: the parameters of {weights.source}")
    print(verified)
    print(f"next: {card.loading(weights, name, path)[0][1]}")


if __name__ == "__main__":
    cli.run(main)
