"""Looks into checkpoints and makes others of them, without an accelerator.

python tools/checkpoint.py inspect RUN                  arrays: shapes, shardings, bytes
python tools/checkpoint.py extract RUN FILE.safetensors parameters, without optimizer state
python tools/checkpoint.py average RUN DIR --last=3     the mean of the newest checkpoints
python tools/checkpoint.py average RUN DIR --last=9 --decay=0.8

The last is an exponential moving average over the checkpoints that the run has kept, from the
oldest of the 9 on: average = decay · average + (1 - decay) · checkpoint.
"""

import dgpt_jax.starting  # noqa: F401

import dataclasses
import shlex
from collections.abc import Iterator

import jax
import numpy as np

from dgpt_jax import checkpoint, cli, open_files, signals
from dgpt_jax.convert import card, export, formats, layout
from dgpt_jax.convert.weights import Weights
from dgpt_jax.schema import UserError

BLOCK = 1 << 20  # values that are averaged at a time


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
    for names in _groups(weights.params):  # in the places of the newest checkpoint's arrays
        weights.params.update(_average_of(path, steps, names, weights.params, decay))
    kind = "mean" if decay is None else f"moving average (decay {decay:g})"
    source = f"{path}, {kind} of the steps {', '.join(map(str, steps))}"
    run = {**weights.run, "averaged": steps} | ({} if decay is None else {"decay": decay})
    return dataclasses.replace(weights, source=source, run=run)


def _groups(params: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """Names of arrays that together take no more than the largest array does."""
    limit, names, size = max(x.nbytes for x in params.values()), [], 0
    for name, array in params.items():
        if size + array.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    yield names


def _average_of(path, steps, names, newest, decay: float | None) -> dict[str, np.ndarray]:
    """Averages of some arrays of the checkpoints `steps`; `newest`: all arrays of the last."""
    sums: dict[str, np.ndarray] = {}
    for i, step in enumerate(steps):
        arrays = newest if step == steps[-1] else _load(path, step, names)
        for name in names:
            if arrays[name].shape != newest[name].shape:
                raise UserError(f"{path}: {name} of step {step} has another shape than the newest")
            if i == 0:
                sums[name] = arrays[name].astype(np.float64)
            else:
                share = 1 / (i + 1) if decay is None else 1 - decay
                _move(sums[name].reshape(-1), arrays[name].reshape(-1), share)
    return {name: total.astype(np.float32) for name, total in sums.items()}


def _move(sums: np.ndarray, values: np.ndarray, share: float):
    """Moves flat sums towards values, block by block: whole differences would be as large again."""
    for start in range(0, sums.size, BLOCK):
        block = sums[start : start + BLOCK]
        block += share * (values[start : start + BLOCK] - block)


def _load(path, step: int, names) -> dict[str, np.ndarray]:
    """Some arrays of a checkpoint."""
    params = layout.flatten(checkpoint.load_params(path, step, parts=names)[0])
    if missing := [name for name in names if name not in params]:
        raise UserError(f"{path}: step {step} has no {missing[0]}, which the newest step has")
    return params


def main():
    made = cli.parser(__doc__)
    made.add_argument("action", choices=("inspect", "extract", "average"))
    made.add_argument("path", type=cli.path, help="work directory")
    made.add_argument("dst", type=cli.local_path, nargs="?", help="what extract and average write")
    made.add_argument("--last", type=int, default=2, help="average: checkpoints")
    made.add_argument("--decay", type=float, help="average: exponential, with this decay")
    made.add_argument("--step", type=int, least=0, help="inspect: which; default: the newest")
    args = made.parse_args()
    if (args.dst is None) != (args.action == "inspect"):
        made.error("extract and average write DST, inspect writes nothing")
    signals.raise_on_sigterm()  # nothing half-written is left
    open_files.return_memory()
    jax.config.update("jax_platforms", "cpu")
    if args.action == "inspect":
        print("\n".join(inspect(args.path, args.step)))
        print(f"next: python tools/convert.py {shlex.quote(args.path)} DIR --to=timm")
        return
    name = "safetensors" if args.action == "extract" else "flax"
    layout = formats.LAYOUTS[name]
    export.check_place(layout, args.dst)
    if args.action == "extract":
        weights = formats.read(args.path)[1]
    else:
        weights = average(args.path, args.last, args.decay)
    path, verified = export.write(weights, layout, args.dst, release=True)
    print(f"wrote {path}: the parameters of {weights.source}")
    print(verified)
    print(f"next: {card.loading(weights, name, path)[0][1]}")


if __name__ == "__main__":
    cli.run(main)
