"""Looks into checkpoints and makes others of them, without an accelerator.

python tools/checkpoint.py inspect RUN                  arrays: shapes, shardings, bytes
python tools/checkpoint.py extract RUN FILE.safetensors parameters, without optimizer state
python tools/checkpoint.py average RUN DIR --last=3     the mean of the newest checkpoints
python tools/checkpoint.py average RUN DIR --last=9 --decay=0.8

The last is an exponential moving average over the checkpoints that the run has kept, from the
oldest of the 9 on: average = decay · average + (1 - decay) · checkpoint.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from dgpt_jax import checkpoint, cli, signals
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


def average(path, last: int, decay: float | None = None) -> Weights:
    """The newest checkpoint's weights, with an average of the parameters of the `last` newest.

    Their mean, or with a decay their exponential moving average, begun at the oldest. UserError.
    """
    steps = checkpoint.steps(path)[-last:]
    if len(steps) < last or last < 1:
        raise UserError(f"{path} has {len(steps)} checkpoints, not {last}")
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"decay {decay:g} is not in [0, 1)")
    _, weights = formats.read(path)
    sums = {name: np.zeros(x.shape, np.float64) for name, x in weights.params.items()}
    for i, step in enumerate(steps):
        share = 1 / (i + 1) if decay is None or i == 0 else 1 - decay
        params, _ = checkpoint.load_params(path, step)
        for name, leaf in layout.flatten(params).items():
            sums[name] += share * (leaf - sums[name])
    params = {name: total.astype(np.float32) for name, total in sums.items()}
    kind = "mean" if decay is None else f"moving average (decay {decay:g})"
    source = f"{path}, {kind} of the steps {', '.join(map(str, steps))}"
    run = {**weights.run, "averaged": steps} | ({} if decay is None else {"decay": decay})
    return dataclasses.replace(weights, params=params, source=source, run=run)


def main():
    made = cli.parser(__doc__)
    made.add_argument("action", choices=("inspect", "extract", "average"))
    made.add_argument("path", help="work directory")
    made.add_argument("dst", nargs="?", help="what extract and average write")
    made.add_argument("--last", type=int, default=2, help="average: checkpoints")
    made.add_argument("--decay", type=float, help="average: exponential, with this decay")
    made.add_argument("--step", type=int, help="inspect: which; default: the newest")
    args = made.parse_args()
    if (args.dst is None) != (args.action == "inspect"):
        made.error("extract and average write DST, inspect writes nothing")
    signals.raise_on_sigterm()  # nothing half-written is left
    jax.config.update("jax_platforms", "cpu")
    if args.action == "inspect":
        print("\n".join(inspect(args.path, args.step)))
        print(f"next: python tools/convert.py {args.path} DIR --to=timm")
        return
    if args.action == "extract":
        name, weights = "safetensors", formats.read(args.path)[1]
    else:
        name, weights = "flax", average(args.path, args.last, args.decay)
    path, verified = export.write(weights, formats.LAYOUTS[name], Path(args.dst), release=True)
    print(f"wrote {path}: the parameters of {weights.source}")
    print(verified)
    print(f"next: {card.loading(weights, name, path)[0][1]}")


if __name__ == "__main__":
    cli.run(main)
