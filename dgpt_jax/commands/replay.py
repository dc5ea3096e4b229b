"""Runs a step whose numbers went bad again, alone: DIR is the bad_step_… directory of a run.

Prints which examples have a loss that is not finite by themselves, and the layers with the largest
gradients, those that are not finite first. --dtype=float32 tells whether bfloat16 is at fault.
"""

import dgpt_jax.starting  # noqa: F401

import re

from dgpt_jax import cli, replay
from dgpt_jax.schema import UserError


def rows_of(text: str) -> slice:
    """START:STOP, or a count of the first rows. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if not match:
        raise UserError(f"--rows={text} is neither START:STOP nor a count: say --rows=0:256")
    return slice(int(match[1] or 0), int(match[2]))


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("dir", type=cli.path, help="WORKDIR/bad_step_N")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's")
    parser.add_argument(
        "--rows", help="rows of the batch to run, START:STOP or a count of the first; default: all"
    )
    parser.add_argument("--layers", type=int, default=20, help="layers to print")
    args = parser.parse_args()
    rows = rows_of(args.rows) if args.rows else None
    step = replay.replay(args.dir, dtype=args.dtype, rows=rows)
    part, whole = "", ""
    if len(step.ids) < step.batch_size:
        part = f" of rows {step.rows.start}:{step.rows.stop}"
        whole = f" of all {step.batch_size} rows"
    now, before = step.now["loss"], step.before["loss"]
    print(f"step {step.step}: loss {now:g}{part}, in the run {before:g}{whole}")
    bad = step.bad_examples()
    print(f"{len(bad)} of {len(step.ids)} examples are not finite{': ' if bad else ''}", end="")
    print(", ".join(bad[:10]) + (" …" if len(bad) > 10 else ""))
    print(f"{'layer':56} {'parameters':>12} {'gradient':>12}")
    for name, norm, grad in step.layers()[: args.layers]:
        print(f"{name:56} {norm:12.4g} {grad:12.4g}")
    print("next: look at these examples in the data, or run again with --dtype=float32")


if __name__ == "__main__":
    cli.run(main)
