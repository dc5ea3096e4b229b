"""Replays a step with non-finite numbers: DIR is a run's bad_step_… directory.

Prints the examples with a non-finite loss and the layers with the largest gradients, non-finite
ones first. --dtype=float32 shows whether bfloat16 is the cause.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import re

from dgpt_jax import cli
from dgpt_jax.errors import UserError
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.training import bad_step_replay


def parse_rows(text: str) -> slice:
    """Slice from START:STOP, or of the first COUNT rows. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if not match:
        raise UserError(f"--rows={text} is neither START:STOP nor a count: use e.g. --rows=0:256")
    return slice(int(match[1] or 0), int(match[2]))


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("dir", type=cli.path, help="WORKDIR/bad_step_N")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's")
    parser.add_argument(
        "--rows",
        help="rows of the batch to replay: START:STOP, or COUNT of the first; default: all",
    )
    parser.add_argument("--layers", type=int, default=20, help="layers to print")
    args = parser.parse_args()
    rows = parse_rows(args.rows) if args.rows else None
    kernel_check.select("auto", cli.say)
    step = bad_step_replay.replay(args.dir, dtype=args.dtype, rows=rows)
    subset, full = "", ""
    if len(step.ids) < step.batch_size:
        subset = f" of rows {step.rows.start}:{step.rows.stop}"
        full = f" of all {step.batch_size} rows"
    now, before = step.now["loss"], step.before["loss"]
    print(f"step {step.step}: loss {now:g}{subset}, in the run {before:g}{full}")
    bad = step.bad_examples()
    print(
        f"{len(bad)} of {len(step.ids)} examples have non-finite losses{': ' if bad else ''}",
        end="",
    )
    print(", ".join(bad[:10]) + (" …" if len(bad) > 10 else ""))
    print(f"{'layer':56} {'parameters':>12} {'gradient':>12}")
    for name, norm, grad in step.layers()[: args.layers]:
        print(f"{name:56} {norm:12.4g} {grad:12.4g}")
    print("next: inspect these examples in the dataset, or replay with --dtype=float32")


if __name__ == "__main__":
    cli.run(main)
