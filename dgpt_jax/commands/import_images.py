"""Imports an image collection as a TFDS image dataset; labels are optional."""

import dgpt_jax.distributed.early_signals  # noqa: F401

import os
import shlex
import warnings
from typing import Any

from dgpt_jax import cli, invocation
from dgpt_jax.data.ingest import decoder_messages, discovery, importer, user_images
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.errors import counted
from dgpt_jax.storage import output_paths

MAX_CLASSES_SHOWN = 12


def parse() -> dict[str, Any]:
    """Returns the flags, those of columns and of decoding as `columns` and `options`. Raises
    UserError."""
    parser = cli.parser(f"{importer.__doc__}\n{discovery.__doc__}")
    parser.add_argument("src", type=cli.path, help="folder, archive, list or pattern")
    parser.add_argument(
        "--out",
        type=cli.path,
        required=True,
        help="directory of the dataset, created if missing; may be on gs://",
    )
    parser.add_argument(
        "--split", help="split name if SRC has no split folders; default: the tar's, or train"
    )
    parser.add_argument(
        "--labels",
        type=cli.path,
        metavar="FILE",
        help='lines of "file name<TAB or space>class", one per image',
    )
    parser.add_argument(
        "--image_column", metavar="NAME",
        help="parquet: column of images; WebDataset: extension, as png; default: the only one",
    )  # fmt: skip
    parser.add_argument(
        "--label_column", metavar="NAME",
        help="parquet: column of labels, default the only ClassLabel, else label; WebDataset: key "
        "of .json, default .cls; empty for no labels",
    )  # fmt: skip
    parser.add_argument(
        "--keep", metavar="NAME,…",
        help="text columns to store: of parquet, or keys of WebDataset's .json; caption is .txt",
    )  # fmt: skip
    parser.add_argument(
        "--background", metavar="COLOR", default="white",
        help="color behind transparent images, a name or #rrggbb; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--range", metavar="LOW,HIGH",
        help="values that become black and white in single-channel images deeper than 8 bits; "
        "default: the range of unsigned integers; floats and signed integers have no default",
    )  # fmt: skip
    parser.add_argument(
        "--shard_size", type=int, default=importer.SHARD_SIZE,
        help="files per shard (%(default)s: 1.8 GB at ImageNet's 0.11 MB, so that ImageNet-1K has "
        "79 shards and 21K under 900; an interruption loses at most one)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=max(8, os.cpu_count() or 1), help="default %(default)s"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="verify complete shards by checksum; default: by size",
    )
    args = vars(parser.parse_args())
    args["options"] = user_images.Options.parse(args.pop("background"), args.pop("range"))
    columns = [args.pop(name) for name in ("image_column", "label_column", "keep")]
    args["columns"] = Columns.parse(*columns)
    return args


def main():
    args = parse()
    output_paths.directory(args["out"])
    # Pillow warns about odd EXIF data and large images, and prints lines of its own source.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        with decoder_messages.count_messages() as messages:
            report = importer.import_images(**args, say=cli.say)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command to resume")
        raise
    for line in decoder_messages.summary(messages):
        cli.say(line)
    say_report(report, args["out"], args["options"])
    flags = [f"--config.source={args['out']}"]
    if "train" not in report.examples:
        flags.append(f"--config.split={next(iter(report.examples))}")
    cli.say(
        f"next: {invocation.command('tokens')} --config=tokens_in1k_openclip_h14 "
        f"{shlex.join(flags)} --config.teacher.weights=CLIP_DIR --out=TOKENS"
    )


def say_report(report: importer.Report, out: str, options: user_images.Options):
    """Prints what was skipped or changed, and what the dataset holds."""
    for line in (*report.skipped, *(f"skipped {line}" for line in report.broken)):
        cli.say(line)
    if report.transparent:
        red, green, blue = options.background
        color = f"#{red:02x}{green:02x}{blue:02x}"
        cli.say(f"composited {counted(report.transparent, 'transparent image')} on {color}")
    for name, count in report.empty_texts.items():
        cli.say(f"stored an empty text for {counted(count, 'image')} without {name}")
    counts = ", ".join(f"{name} {n}" for name, n in report.examples.items())
    cli.say(
        f"{out}: {counts}; {_classes(report.classes)}; "
        f"skipped {counted(len(report.broken), 'unreadable file')}"
    )


def _classes(names: list[str]) -> str:
    if not names:
        return "no labels"
    shown = f" ({', '.join(names)})" * (len(names) <= MAX_CLASSES_SHOWN)
    return counted(len(names), "class", "classes") + shown


if __name__ == "__main__":
    cli.run(main)
