"""Visualizes an encoder: tokens, attention, nearest neighbors or predictions.

    python tools/visualize.py CHECKPOINT IMAGE… --out=FILE.png [--show=tokens] [--count=12]

IMAGE are files or directories; CHECKPOINT is a work directory or weights. The figure has --count
images, evenly spaced among all of them. `--show` is one of

    tokens       patch tokens as colors: the first three principal components over all images are
                 red, green and blue; below, the same of the foreground, which the first component
                 separates
    attention    attention of CLS in the last block: the mean of the heads, then each head
    neighbors    for each image its --neighbors nearest by cosine similarity of --features, among
                 --gallery evenly spaced images
    predictions  predictions of the pretraining model (a work directory with decoders) for segments
                 of images of a token store, beside the teacher's tokens; captions are mean cosines
                 by rank in the order, the last row those of a constant guess:

    python tools/visualize.py RUN --show=predictions --store=TOKENS --out=FILE.png
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from dgpt_jax import cli
from dgpt_jax.commands.image_grid import COLUMNS, grid
from dgpt_jax.commands.image_selection import label, list_images, read_images, spread
from dgpt_jax.commands.plot import FORMATS
from dgpt_jax.config import ModelConfig
from dgpt_jax.data import bad_records, image_ops, segments, token_store, transforms
from dgpt_jax.data.ingest.image_index import ImageEntry
from dgpt_jax.errors import UserError
from dgpt_jax.evals.feature_maps import (
    cls_attention,
    foreground,
    neighbors,
    pca_colors,
    prediction_maps,
)
from dgpt_jax.evals.figures import heat, mean_token_cosine, prediction_captions, prediction_rows
from dgpt_jax.storage import output_paths, tfds_dataset
from dgpt_jax.weights import api, flags
from dgpt_jax.weights.chunking import CHUNK

MAX_IMAGES = 64  # in a figure
Figure = tuple[dict[str, np.ndarray], dict[str, list[str]]]  # rows and captions of image_grid.grid


def show_tokens(
    encoder: api.PretrainedEncoder, entries: Sequence[ImageEntry], args: argparse.Namespace
) -> Figure:
    entries = spread(entries, args.count)
    images = read_images(entries, encoder.model.image_size)
    tokens = np.asarray(encoder.tokens(images))[:, 1:]
    mask, colors = foreground(tokens)
    shape = (len(images), encoder.model.grid, -1, 3)
    rows = {
        "image": images,
        "tokens": pca_colors(tokens).reshape(shape),
        "foreground": colors.reshape(shape),
    }
    shares = [f"{share:.0%} of the patches" for share in mask.mean(axis=1)]
    return rows, {"image": list(map(label, entries)), "foreground": shares}


def show_attention(
    encoder: api.PretrainedEncoder, entries: Sequence[ImageEntry], args: argparse.Namespace
) -> Figure:
    entries = spread(entries, args.count)
    images = read_images(entries, encoder.model.image_size)
    attention = cls_attention(encoder, images)
    side = encoder.model.grid
    maps = attention[:, :, 1:].reshape(*attention.shape[:2], side, side)
    rows = {"image": images, "mean of heads": heat(maps.mean(axis=1))}
    captions = {
        "image": list(map(label, entries)),
        "mean of heads": [f"CLS itself {x:.0%}" for x in attention[:, :, 0].mean(axis=1)],
    }
    for head in range(maps.shape[1]):
        rows[f"head {head + 1}"] = heat(maps[:, head])
        largest = maps[:, head].max(axis=(1, 2))
        captions[f"head {head + 1}"] = [f"brightest {x:.1%}" for x in largest]
    return rows, captions


def show_neighbors(
    encoder: api.PretrainedEncoder, entries: Sequence[ImageEntry], args: argparse.Namespace
) -> Figure:
    """Nearest images by cosine of their features. Raises UserError for fewer than two images."""
    if len(entries) < 2:
        raise UserError("--show=neighbors needs at least 2 images")
    gallery, size = spread(entries, args.gallery, "--gallery"), encoder.model.image_size
    features = [
        np.asarray(encoder.features(read_images(gallery[i : i + CHUNK], size), args.features))
        for i in range(0, len(gallery), CHUNK)
    ]
    queries = spread(range(len(gallery)), args.count)
    nearest, cosines = neighbors(np.concatenate(features), args.neighbors, queries)
    rows, captions = {}, {}
    for query, indices, values in zip(queries, nearest, cosines, strict=True):
        line = [gallery[i] for i in (query, *indices)]
        first, *others = map(label, line)
        rows[title := f"image {len(rows) + 1}"] = read_images(line, size)
        captions[title] = [first, *map("{}\n{:.3f}".format, others, values)]
    return rows, captions


def store_examples(
    args: argparse.Namespace, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """(images, decoded tokens, orders, True if tokens start with CLS) of --count examples of a
    token store."""
    info = token_store.StoreInfo.load(args.store)
    token_store.require_finished(args.store)
    source = tfds_dataset.Split(args.store, token_store.view_split(args.view))
    images, tokens, orders = [], [], []
    for index in spread(range(len(source)), args.count):
        record = source[index]
        image = bad_records.decode_image(source, index, record)
        images.append(image_ops.resize(image, model.image_size, model.image_size))
        tokens.append(record["tokens"])
        rng = transforms.generator(args.seed, transforms.ORDER, index)
        orders.append(segments.sample_order(rng, model.segments))
    decoded = np.asarray(info.teacher.load_codec(args.store).decode(np.stack(tokens)), np.float32)
    return np.stack(images), decoded, np.stack(orders), info.teacher.cls


def show_predictions(args: argparse.Namespace) -> Figure:
    """Predictions beside stored tokens. Raises UserError if the store does not fit the model."""
    model = api.load_digpt(args.checkpoint, heads=args.heads, decoder_heads=args.decoder_heads)
    images, tokens, orders, cls = store_examples(args, model.model)
    if (width := tokens.shape[-1]) != (expected := model.module.out_width):
        raise UserError(
            f"{args.store} holds tokens of {width} channels, {args.checkpoint} predicts {expected}"
        )
    maps = prediction_maps(model, images, tokens, orders, cls)
    shape = model.model.segments
    rows = prediction_rows(maps, images, orders, shape)
    guess = mean_token_cosine(maps)  # the baseline for the cosines
    rows["mean token: cosine"] = heat(guess, 0.0, 1.0)
    return rows, prediction_captions(maps, guess, orders, shape)


RENDERERS = {"tokens": show_tokens, "attention": show_attention, "neighbors": show_neighbors}


def american(name: str) -> str:
    """The spelling of a figure's name; the British one is accepted as well."""
    return name.replace("neighbours", "neighbors")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of `words`, of the command line by default. Raises UserError."""
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=cli.path, help="work directory or weights")
    parser.add_argument("images", type=cli.path, nargs="*", help="image files or directories")
    parser.add_argument(
        "--show", type=american, choices=(*RENDERERS, "predictions"), default="tokens"
    )
    parser.add_argument("--out", type=cli.local_path, required=True, help="PNG file")
    parser.add_argument("--count", type=int, default=12, help=f"images shown, up to {MAX_IMAGES}")
    parser.add_argument("--neighbors", "--neighbours", type=int, default=6, help="per image")
    parser.add_argument("--gallery", type=int, default=1000, help="images to find neighbors among")
    parser.add_argument("--features", choices=("cls", "mean"), default="mean", help="of neighbors")
    flags.add_encoder(parser, decoders=True)
    parser.add_argument("--store", type=cli.path, help="token store, for predictions")
    parser.add_argument("--view", type=int, least=0, default=0, help="view of the store")
    parser.add_argument("--seed", type=int, least=0, default=0, help="of the orders of segments")
    args = parser.parse_intermixed_args(words)
    for name, allowed in (
        ("count", range(1, MAX_IMAGES + 1)), ("neighbors", range(1, COLUMNS)),
        ("gallery", range(2, sys.maxsize)),
    ):  # fmt: skip
        if (value := getattr(args, name)) not in allowed:
            raise UserError(f"--{name}={value}: must be from {allowed[0]} to {allowed[-1]}")
    if args.show == "predictions" and (args.images or not args.store):
        raise UserError("--show=predictions needs --store=TOKENS and no images")
    if args.show != "predictions" and args.decoder_heads:
        raise UserError("--decoder_heads needs --show=predictions")
    if args.show != "predictions" and (args.store or not args.images):
        raise UserError(f"--show={args.show} needs images and no --store")
    return args


def main():
    args = parse()
    output_paths.file(args.out, FORMATS)
    if args.show == "predictions":
        rows, captions = show_predictions(args)
    else:
        entries = list_images(args.images)
        encoder = api.load_encoder(args.checkpoint, heads=args.heads)
        for note in encoder.notes:
            cli.say(note)
        rows, captions = RENDERERS[args.show](encoder, entries, args)
    grid(rows, args.out, captions)
    print(f"wrote {args.out}")
    print(f"next: look at {args.out}; other figures with --show={'|'.join(RENDERERS)}|predictions")


if __name__ == "__main__":
    cli.run(main)
