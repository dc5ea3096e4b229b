"""A collection of images → a TFDS image dataset (labels optional); see dgpt_jax/images.py."""

import dgpt_jax.starting  # noqa: F401

import os
import shlex
import warnings

from dgpt_jax import cli, decoder_lines, image_files, images, outputs, user_images

NAMES = 12  # classes that are named


def main():
    made = cli.parser(f"{images.__doc__}\n{image_files.__doc__}")
    made.add_argument("src", type=cli.path, help="folder, tar or list of images")
    made.add_argument(
        "--out",
        type=cli.path,
        required=True,
        help="directory of the dataset; made if absent; gs:// as well",
    )
    made.add_argument(
        "--split", help="split name where SRC has no split folders; default: the tar's, or train"
    )
    made.add_argument(
        "--labels",
        type=cli.path,
        metavar="FILE",
        help='"file name<TAB or space>class", a line an image',
    )
    made.add_argument(
        "--background", metavar="COLOUR", default="white",
        help="below transparent images: a name or #rrggbb; default %(default)s",
    )  # fmt: skip
    made.add_argument(
        "--range", metavar="LOW,HIGH",
        help="what becomes black and white in images of one channel deeper than 8 bits; default: "
        "the range of unsigned integers; floats and signed integers have none",
    )  # fmt: skip
    made.add_argument(
        "--shard_size", type=int, default=images.SHARD_SIZE,
        help="files a shard (%(default)s: 1.8 GB at ImageNet's 0.11 MB, so that ImageNet-1K "
        "is 79 shards and 21K under 900; a kill costs at most one)",
    )  # fmt: skip
    made.add_argument(
        "--threads", type=int, default=max(8, os.cpu_count() or 1), help="default %(default)s"
    )
    made.add_argument(
        "--check",
        action="store_true",
        help="read complete shards and compare checksums; default: their sizes",
    )
    args = vars(made.parse_args())
    options = user_images.Options.parse(args.pop("background"), args.pop("range"))
    outputs.directory(args["out"])
    # Pillow warns of odd EXIF data and large pictures, with lines of its own source.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        with decoder_lines.counted() as decoders:
            report = images.import_images(**args, options=options, say=cli.say)
    except KeyboardInterrupt:
        print("\nstopped: the same command continues")
        raise
    for line in (
        *decoder_lines.told(decoders),
        *report.passed,
        *(f"skipped {line}" for line in report.broken),
    ):
        cli.say(line)
    if report.transparent:
        red, green, blue = options.background
        cli.say(f"{report.transparent} transparent images lie on #{red:02x}{green:02x}{blue:02x}")
    counts = ", ".join(f"{name} {n}" for name, n in report.examples.items())
    cli.say(
        f"{args['out']}: {counts}; {_classes(report.classes)}; "
        f"{len(report.broken)} unreadable files skipped"
    )
    cli.say(
        f"next: python tools/build_tokens.py --config=configs/tokens_in1k_openclip_h14.py "
        f"{shlex.quote('--config.source=' + args['out'])} --out=TOKENS"
    )


def _classes(names: list[str]) -> str:
    if not names:
        return "no labels"
    return f"{len(names)} classes" + f" ({', '.join(names)})" * (len(names) <= NAMES)


if __name__ == "__main__":
    cli.run(main)
