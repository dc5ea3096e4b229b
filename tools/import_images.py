"""A folder of images → a TFDS image dataset (labels optional); see dgpt_jax/images.py."""

from dgpt_jax import cli, images


def main():
    made = cli.parser(images.__doc__)
    made.add_argument("src", help="folder of images")
    made.add_argument("--out", required=True, help="directory of the dataset; made if absent")
    made.add_argument("--split", default="train", help="split name where SRC has no split folders")
    made.add_argument("--shard_size", type=int, default=8192, help="images a shard")
    made.add_argument("--threads", type=int, default=8)
    args = made.parse_args()
    report = images.import_folder(
        args.src, args.out, split=args.split, shard_size=args.shard_size, threads=args.threads
    )
    for line in report.broken:
        print(f"skipped {line}")
    counts = ", ".join(f"{name} {n}" for name, n in report.examples.items())
    classes = f"{len(report.classes)} classes" if report.classes else "no labels"
    print(f"{args.out}: {counts}; {classes}; {len(report.broken)} unreadable files skipped")
    print(
        f"next: python tools/build_tokens.py --config=configs/tokens_in1k_openclip_h14.py "
        f"--config.source={args.out} --out=TOKENS"
    )


if __name__ == "__main__":
    cli.run(main)
