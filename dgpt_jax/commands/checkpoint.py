"""Inspects, extracts and averages checkpoints, on the CPU.

python tools/checkpoint.py inspect RUN                  sizes by block; --all: each array
python tools/checkpoint.py extract RUN FILE.safetensors parameters, without optimizer state
python tools/checkpoint.py average RUN DIR --last=3     the mean of the newest checkpoints
python tools/checkpoint.py average RUN DIR --last=9 --decay=0.8

With --decay it is an exponential moving average that starts at the oldest of the checkpoints:
average = decay · average + (1 - decay) · checkpoint.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from dgpt_jax import cli, invocation
from dgpt_jax.distributed import preemption
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import file_limits, orbax_checkpoint
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.weights import card, export, mapping, registry
from dgpt_jax.weights.types import Weights

BLOCK = 1 << 20  # values averaged at a time


def inspect(path: AnyPath, step: int | None, *, every: bool = False) -> list[str]:
    """A line per block, with `every` one per array, and one with totals."""
    rows = orbax_checkpoint.describe(path, step)
    sums = {
        part: sum(row[-1] for row in rows if row[0].startswith(part))
        for part in ("params", "opt_state")
    }
    totals = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in sums.items())
    if every:
        lines = ["name  shape  dtype  sharding  bytes", *("  ".join(map(str, row)) for row in rows)]
    else:
        lines = [*_blocks(rows), "--all lists each array: shape, dtype, sharding, bytes"]
    return [*lines, f"{counted(len(rows), 'array')}: {totals}"]


def _blocks(rows: Sequence[orbax_checkpoint.Row]) -> list[str]:
    """A table of parameters by module, and of the optimizer state by moment."""
    tops = {row[0].split("/")[1] for row in rows if row[0].startswith("params/")}
    blocks: dict[str, list[orbax_checkpoint.Row]] = {}
    for row in rows:
        part, *names = row[0].split("/")
        depth = next((i for i, name in enumerate(names) if name in tops), None)
        if part == "params":
            name = "/".join([part, *names[:2]])
        else:
            name = f"{part}/counters" if depth is None else "/".join([part, *names[:depth]])
        blocks.setdefault(name, []).append(row)
    width = max(map(len, blocks), default=0)
    lines = [f"{'block':{width}}  arrays        values         MB  dtype"]
    for name, members in blocks.items():
        values = sum(math.prod(shape) for _, shape, *_ in members)
        dtypes = ", ".join(sorted({dtype for _, _, dtype, *_ in members}))
        size = sum(row[-1] for row in members) / 1e6
        lines.append(f"{name:{width}}  {len(members):6} {values:13,} {size:10.2f}  {dtypes}")
    return lines


def average(path: AnyPath, last: int, decay: float | None = None) -> Weights:
    """Weights with averaged parameters of the `last` newest checkpoints.

    Their mean, or with a decay their exponential moving average from the oldest. Raises UserError.
    """
    steps = orbax_checkpoint.steps(path)[-last:]
    if len(steps) < last or last < 1:
        raise UserError(f"{path} has {counted(len(steps), 'checkpoint')}, not {last}")
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"decay {decay:g} is not in [0, 1)")
    _, weights = registry.read(path)
    for names in _groups(weights.params):  # replaces the newest checkpoint's arrays
        weights.params.update(_average_of(path, steps, names, weights.params, decay))
    kind = "mean" if decay is None else f"moving average (decay {decay:g})"
    source = f"{path}, {kind} of steps {', '.join(map(str, steps))}"
    run = {**weights.run, "averaged": steps} | ({} if decay is None else {"decay": decay})
    return dataclasses.replace(weights, source=source, run=run)


def _groups(params: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """Groups of array names, none larger in total than the largest array."""
    limit, names, size = max(x.nbytes for x in params.values()), [], 0
    for name, array in params.items():
        if size + array.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    yield names


def _average_of(
    path: AnyPath,
    steps: Sequence[int],
    names: Sequence[str],
    newest: Mapping[str, np.ndarray],
    decay: float | None,
) -> dict[str, np.ndarray]:
    """Averages of the named arrays over checkpoints `steps`; newest: all arrays of the last one."""
    averages: dict[str, np.ndarray] = {}
    for i, step in enumerate(steps):
        arrays = newest if step == steps[-1] else _load(path, step, names)
        for name in names:
            if arrays[name].shape != newest[name].shape:
                raise UserError(f"{path}: {name} of step {step} has another shape than the newest")
            if i == 0:
                averages[name] = arrays[name].astype(np.float64)
            else:
                weight = 1 / (i + 1) if decay is None else 1 - decay
                _update(averages[name].reshape(-1), arrays[name].reshape(-1), weight)
    return {name: x.astype(np.float32) for name, x in averages.items()}


def _update(averages: np.ndarray, values: np.ndarray, weight: float) -> None:
    """Moves flat averages towards values in place, in blocks to keep temporaries small."""
    for start in range(0, averages.size, BLOCK):
        block = averages[start : start + BLOCK]
        block += weight * (values[start : start + BLOCK] - block)


def _load(path: AnyPath, step: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Named arrays of a checkpoint."""
    params = mapping.flatten(orbax_checkpoint.load_params(path, step, names=names)[0])
    if missing := [name for name in names if name not in params]:
        raise UserError(f"{path}: step {step} has no {missing[0]}, which the newest step has")
    return params


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("action", choices=("inspect", "extract", "average"))
    parser.add_argument("path", type=cli.path, help="work directory")
    parser.add_argument("dst", type=cli.local_path, nargs="?", help="output of extract and average")
    parser.add_argument("--last", type=int, default=2, help="average: number of checkpoints")
    parser.add_argument(
        "--decay", type=float, help="average: decay of an exponential moving average"
    )
    parser.add_argument("--step", type=int, least=0, help="inspect: step; default: the newest")
    parser.add_argument(
        "--all", action="store_true", help="inspect: list each array, with shape and sharding"
    )
    args = parser.parse_args()
    if (args.dst is None) != (args.action == "inspect"):
        parser.error("DST is required for extract and average, and not allowed for inspect")
    preemption.raise_on_sigterm()  # so that partial files are removed
    file_limits.trim_malloc()
    jax.config.update("jax_platforms", "cpu")
    if args.action == "inspect":
        print("\n".join(inspect(args.path, args.step, every=args.all)))
        source = args.path if args.step is None else f"{args.path}/checkpoints/{args.step}"
        print(f"next: {invocation.command('convert')} {shlex.quote(source)} EXPORT --to=timm")
        return
    name = "safetensors" if args.action == "extract" else "flax"
    layout = registry.LAYOUTS[name]
    export.check_target(layout, args.dst)
    if args.action == "extract":
        weights = registry.read(args.path)[1]
    else:
        weights = average(args.path, args.last, args.decay)
    path, verified = export.write(weights, layout, args.dst, release=True)
    print(f"wrote {path}: the parameters of {weights.source}")
    print(verified)
    print(f"next: load it in Python: {card.loading(weights, name, path)[0][1]}")


if __name__ == "__main__":
    cli.run(main)
