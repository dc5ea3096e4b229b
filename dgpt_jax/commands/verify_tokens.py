"""Re-runs the teacher on stored images and compares its tokens with the stored ones.

Checks a sample of every shard. With --source, ids, crop boxes, flips and images are also compared
with the views of the source, drawn and rendered again. Exits with 1 if anything differs.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import itertools

from dgpt_jax import cli
from dgpt_jax.commands import next_commands
from dgpt_jax.data import further_teachers, token_store
from dgpt_jax.errors import UserError, counted
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.tokens import verify
from dgpt_jax.weights import flags


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("store", type=cli.path, help="directory of a token store")
    parser.add_argument("--weights", type=cli.path, required=True, help="the teacher's weights")
    flags.add_teacher(parser)
    parser.add_argument(
        "--source", type=cli.path, default="", help="image dataset that the store was built from"
    )
    parser.add_argument(
        "--teacher", metavar="NAME", help="the further teacher to verify; default: the first"
    )
    parser.add_argument("--samples", type=int, default=4, help="examples per shard")
    args = parser.parse_args()
    stated = token_store.StoreInfo.load(args.store).teacher
    if args.teacher is not None:
        stated = further_teachers.load(args.store, args.teacher).teacher
    tower = stated.weights.get("tower", {})
    names = ("mean", "std") if args.teacher is None else ("mean", "std", "image_size")
    stored = {name: tower[name] for name in names if name in tower}
    teacher = flags.teacher_config(args, dtype=stated.weights["dtype"], **stored)
    least, median = verify.thresholds(stated)
    damaged = []
    kernel_check.select("auto", cli.say)
    reports = verify.verify(
        args.store, teacher, samples=args.samples, source=args.source, further=args.teacher
    )
    print(f"{'split':8} {'shards':>6} {'examples':>8} {'least':>9} {'median':>9}  worst example")
    for split, group in itertools.groupby(reports, key=lambda report: report.split):
        shards = list(group)
        damaged += [shard for shard in shards if not shard.is_sound(least, median)]
        _print(split, str(len(shards)), shards)
    for shard in damaged[:20]:
        _print(shard.split, f"#{shard.shard}", [shard])
    if damaged:
        raise UserError(
            f"{args.store}: {counted(len(damaged), 'shard')} with tokens of other images "
            f"(required cosines: least {least:.4f}, median {median:.4f}): build the store again"
        )
    print(f"sound: least ≥ {least:.4f}, median ≥ {median:.4f}")
    examples = next_commands.store_examples(args.store)
    print(f"next: {next_commands.train(args.store, examples=examples)}")


def _print(split: str, shards: str, reports: list[verify.ShardReport]):
    examples = [example for report in reports for example in report.examples]
    worst = min((r.worst for r in reports), key=lambda worst: (not worst.differs, worst.median))
    least, median = (min(getattr(e, name) for e in examples) for name in ("least", "median"))
    print(
        f"{split:8} {shards:>6} {len(examples):8} {least:9.6f} {median:9.6f}  {worst.id} "
        f"box {worst.view.box} flip {int(worst.view.flip)} {worst.differs}",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main)
