"""Re-runs the teacher on stored pictures and compares its tokens with the stored ones.

A sample of every shard is looked at. With --source, ids, crop boxes, flips and pictures are also
compared with the views of the source, drawn and rendered again. Exits 1 if anything is wrong.
"""

import dgpt_jax.starting  # noqa: F401

import itertools
import shlex

from dgpt_jax import cli, config, token_store, verify
from dgpt_jax.schema import UserError


def main():
    made = cli.parser(__doc__)
    made.add_argument("store", type=cli.path, help="directory of a token store")
    made.add_argument("--weights", type=cli.path, required=True, help="the teacher's weights")
    made.add_argument("--heads", type=int, help="where no JSON beside the weights tells")
    made.add_argument("--activation", help="likewise: gelu or quick_gelu")
    made.add_argument("--image_size", type=int, help="the teacher's input, if not the JSON's")
    made.add_argument(
        "--source", type=cli.path, default="", help="image dataset that the store was built from"
    )
    made.add_argument("--samples", type=int, default=4, help="examples a shard")
    args = made.parse_args()
    info = token_store.StoreInfo.load(args.store)
    tower = info.teacher.get("tower", {})
    teacher = config.Teacher(
        weights=args.weights,
        heads=args.heads,
        activation=args.activation,
        image_size=args.image_size,
        mean=tuple(tower["mean"]) if "mean" in tower else None,
        std=tuple(tower["std"]) if "std" in tower else None,
        dtype=info.teacher["dtype"],
    )
    least, median = verify.thresholds(info)
    bad = []
    rows = verify.verify(args.store, teacher, samples=args.samples, source=args.source)
    print(f"{'split':8} {'shards':>6} {'examples':>8} {'least':>9} {'median':>9}  worst example")
    for split, of_split in itertools.groupby(rows, key=lambda row: row.split):
        found = list(of_split)
        bad += [row for row in found if not row.is_sound(least, median)]
        _print(split, str(len(found)), found)
    for row in bad[:20]:
        _print(row.split, f"#{row.shard}", [row])
    if bad:
        raise UserError(
            f"{args.store}: {len(bad)} shards do not hold what the teacher makes of their pictures "
            f"(sound are cosines of {least:.4f} and more, a median of {median:.4f}): build again"
        )
    print(
        f"sound: least ≥ {least:.4f}, median ≥ {median:.4f}; "
        f"next: python -m dgpt_jax.train with config.data.path={shlex.quote(args.store)}"
    )


def _print(split: str, shards: str, rows):
    examples = [found for row in rows for found in row.found]
    worst = min(rows, key=lambda row: (not row.worst.differs, row.worst.median)).worst
    least, median = (min(getattr(e, name) for e in examples) for name in ("least", "median"))
    print(
        f"{split:8} {shards:>6} {len(examples):8} {least:9.6f} {median:9.6f}  {worst.id} "
        f"box {worst.view.box} flip {int(worst.view.flip)} {worst.differs}",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main)
