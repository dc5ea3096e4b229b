"""Writes an encoder's features of all images of a source.

    python tools/embed.py SRC --checkpoint=RUN --out=FEATURES
    python tools/embed.py SRC --checkpoint=hf:ORG/NAME --out=FEATURES --tokens=mean --to=parquet
    python tools/embed.py TOKENS --split=view000 --checkpoint=RUN --out=STORE --to=store

SRC is what tools/import_images.py reads (a folder, tar, zip, list, parquet, WebDataset, TFRecord),
an imported or other TFDS dataset of ArrayRecord, or a token store. The encoder is a work directory
or weights that tools/convert.py reads. Images are preprocessed as in evaluations, with the
encoder's own resize, mean and std; crops of a token store are used as they are.

Formats, per split of SRC:

    npy          SPLIT.npy, SPLIT.labels.npy, SPLIT.jsonl (id, label and texts of each row)
    safetensors  SPLIT.safetensors (features, labels), SPLIT.jsonl
    parquet      shards with id, label, text columns and features
    store        a TFDS dataset of ArrayRecord: id, features, label, text columns

The same command resumes; the result is identical, byte by byte.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse
import os
import warnings

from dgpt_jax import cli
from dgpt_jax.data.ingest import decoder_messages
from dgpt_jax.data.ingest.types import Columns
from dgpt_jax.distributed import preemption
from dgpt_jax.errors import counted
from dgpt_jax.evals.embedding import feature_files, feature_store, run
from dgpt_jax.evals.embedding.feature_store import FeatureInfo
from dgpt_jax.storage import output_paths
from dgpt_jax.weights import api, flags

MAX_SHOWN = 12  # unreadable images


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("src", type=cli.path, help="images")
    parser.add_argument(
        "--checkpoint", type=cli.path, required=True, help="work directory or weights"
    )
    parser.add_argument(
        "--out", type=cli.local_path, required=True, help="directory, created if missing"
    )
    parser.add_argument(
        "--to", choices=feature_store.FORMATS, default="npy", help="format; default %(default)s"
    )
    parser.add_argument(
        "--tokens", choices=feature_store.TOKENS, default="cls",
        help="CLS, the mean of the patch tokens, or all tokens, CLS first; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=feature_store.DTYPES, default="float32",
        help="of the stored features; bfloat16 in safetensors and stores; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--split", help="one split of SRC; default: all")
    parser.add_argument(
        "--labels", type=cli.path, metavar="FILE",
        help='of files: lines of "file name<TAB or space>class"',
    )  # fmt: skip
    for name, doc in {
        "image_column": "parquet: column of images; WebDataset: extension, as png",
        "label_column": "parquet: column of labels; WebDataset: key of .json; empty for no labels",
    }.items():
        parser.add_argument(f"--{name}", metavar="NAME", help=doc)
    parser.add_argument(
        "--keep", metavar="NAME,…", help="text columns of parquet or WebDataset to store"
    )
    parser.add_argument(
        "--batch_size", type=int, default=run.BATCH_SIZE,
        help="images per device at a time; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--shard_size", type=int, default=run.SHARD_SIZE,
        help="images per shard, which an interruption loses at most; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=max(run.THREADS, os.cpu_count() or 1),
        help="threads that decode; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--max_bad_fraction", type=float, default=run.MAX_BAD_FRACTION,
        help="unreadable images of a TFDS dataset that are left out; default %(default)s",
    )  # fmt: skip
    flags.add_encoder(parser)
    return parser.parse_args()


def main() -> None:
    args = vars(arguments())
    columns = Columns.parse(*(args.pop(n) for n in ("image_column", "label_column", "keep")))
    feature_files.check_format(args["to"], args["tokens"], args["dtype"])
    output_paths.directory(args["out"])
    preemption.raise_on_sigterm()
    encoder = api.load_encoder(args.pop("checkpoint"), heads=args.pop("heads"))
    for note in encoder.notes:
        cli.say(note)
    # Pillow warns about odd EXIF data and large images.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        with decoder_messages.count_messages() as messages:
            info = run.embed(encoder=encoder, columns=columns, say=cli.say, **args)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command to resume")
        raise
    for line in decoder_messages.summary(messages):
        cli.say(line)
    report(info)
    cli.say(f"next: {_next(args['out'], info)}")


def report(info: FeatureInfo) -> None:
    """Prints what was left out, and the number of rows of each split."""
    skipped = [line for split in info.splits.values() for line in split["unreadable"]]
    for line in skipped[:MAX_SHOWN]:
        cli.say(f"skipped {line}")
    if (more := len(skipped) - MAX_SHOWN) > 0:
        cli.say(f"skipped {more} more, which the metadata list")
    counts = ", ".join(f"{name} {split['rows']}" for name, split in info.splits.items())
    shape = "×".join(map(str, info.shape))
    cli.say(
        f"{info.tokens} features {shape} {info.dtype} of {info.encoder['source']}: {counts}; "
        f"skipped {counted(len(skipped), 'unreadable image')}"
    )


def _next(out, info: FeatureInfo) -> str:
    """What to do with the features, in Python."""
    split, path = next(iter(info.splits)), os.fspath(out)
    calls = {
        "npy": f"numpy.load({f'{path}/{split}.npy'!r}, mmap_mode='r')",
        "safetensors": f"safetensors.numpy.load_file({f'{path}/{split}.safetensors'!r})",
        "parquet": f"pyarrow.parquet.read_table({path!r}) has the columns id and features",
        "store": f"dgpt_jax.evals.embedding.feature_store.open({path!r})[{split!r}][0]['features']",
    }
    return f"read them in Python: {calls[info.to]}"


if __name__ == "__main__":
    cli.run(main)
