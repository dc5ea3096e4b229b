"""Re-runs the teacher on stored pictures and compares its tokens with the stored ones.

Exits 1 if a cosine lies below what the store's codec and teacher dtype allow.
"""

from dgpt_jax import build, cli, config, records
from dgpt_jax.schema import UserError


def main():
    made = cli.parser(__doc__)
    made.add_argument("store", help="directory of a token store")
    made.add_argument("--weights", required=True, help="the teacher's weights")
    made.add_argument("--heads", type=int, help="where no JSON beside the weights tells")
    made.add_argument("--activation", help="likewise: gelu or quick_gelu")
    made.add_argument("--image_size", type=int, help="the teacher's input, if not the JSON's")
    made.add_argument("--samples", type=int, default=64, help="examples a view")
    made.add_argument("--threshold", type=float, help="least cosine; default: by codec and dtype")
    args = made.parse_args()
    info = records.StoreInfo.load(args.store)
    teacher = config.Teacher(
        weights=args.weights,
        heads=args.heads,
        activation=args.activation,
        image_size=args.image_size,
        dtype=info.teacher["dtype"],
    )
    least = args.threshold if args.threshold is not None else build.threshold(info)
    rows = build.verify(args.store, teacher, args.samples)
    print(f"{'split':10} {'examples':>8} {'least':>9} {'median':>9}  worst example")
    for row in rows:
        print(
            f"{row['split']:10} {row['examples']:8} {row['min']:9.6f} {row['median']:9.6f}  "
            f"{row['worst']}"
        )
    bad = [row["split"] for row in rows if row["min"] < least]
    if bad:
        raise UserError(
            f"{args.store}: stored tokens are not the teacher's in {', '.join(bad)} (least cosine "
            f"below {least}): build the store again"
        )
    print(
        f"all cosines ≥ {least}; next: python -m dgpt_jax.train with config.data.path={args.store}"
    )


if __name__ == "__main__":
    cli.run(main)
