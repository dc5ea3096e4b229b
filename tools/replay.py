"""Runs a step whose numbers went bad again, alone: DIR is the bad_step_… directory of a run.

Prints which examples have a loss that is not finite by themselves, and the layers with the largest
gradients, those that are not finite first. --dtype=float32 tells whether bfloat16 is at fault.
"""

from dgpt_jax import cli, replay


def main():
    made = cli.parser(__doc__)
    made.add_argument("dir", help="WORKDIR/bad_step_N")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the run's")
    made.add_argument("--rows", type=int, default=20, help="layers to print")
    args = made.parse_args()
    found = replay.replay(args.dir, dtype=args.dtype)
    print(f"step {found.step}: loss {found.now['loss']:g}, in the run {found.before['loss']:g}")
    bad = found.bad_examples()
    print(f"{len(bad)} of {len(found.ids)} examples are not finite{': ' if bad else ''}", end="")
    print(", ".join(bad[:10]) + (" …" if len(bad) > 10 else ""))
    print(f"{'layer':56} {'parameters':>12} {'gradient':>12}")
    for name, norm, grad in found.rows()[: args.rows]:
        print(f"{name:56} {norm:12.4g} {grad:12.4g}")
    print("next: look at these examples in the data, or run again with --dtype=float32")


if __name__ == "__main__":
    cli.run(main)
