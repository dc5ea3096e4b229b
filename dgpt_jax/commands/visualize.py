"""What an encoder sees, as pictures.

    python tools/visualize.py CHECKPOINT IMAGE… --out=FILE.png [--show=tokens] [--count=12]

IMAGE are files or folders; CHECKPOINT is a work directory or weights. Shown are --count images,
evenly spread over all of them. `--show` is one of

    tokens       patch tokens as colours: the first principal components of all shown images
                 together are red, green and blue; below, of the foreground, which the first
                 component tells
    attention    where CLS attends to in the last block: the mean of the heads, then each head
    neighbours   for each shown image its --neighbours nearest, by the cosine of features
                 (--features), among --gallery evenly spread images
    predictions  what the pretraining model (a work directory with decoders) predicts of the
                 segments of pictures of a token store, beside the teacher's tokens; captions are
                 mean cosines by place in the order, below those of a constant guess:

    python tools/visualize.py RUN --show=predictions --store=TOKENS --out=FILE.png
"""

import dgpt_jax.starting  # noqa: F401

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from plot import FORMATS, plt, save

from dgpt_jax import (
    bad_records,
    cli,
    examples,
    image_walk,
    load,
    outputs,
    records,
    segments,
    token_store,
    user_images,
    views,
)
from dgpt_jax.maps import cls_attention, foreground, neighbours, pca_colours, prediction_maps
from dgpt_jax.members import OWN_FILE, Member, text
from dgpt_jax.pictures import heat, mean_token_cosine, prediction_captions, prediction_rows
from dgpt_jax.schema import UserError

MOST = 64  # images in a figure
COLUMNS = 12  # images in a line of a figure


def grid(rows: dict[str, np.ndarray], out, captions: dict[str, list[str]] | None = None):
    """A picture with one titled row of images (B, height, width, 3) for each entry; captions, where
    a row has some, stand above its images. More than COLUMNS images go on below all rows."""
    captions = captions or {}
    most = max(map(len, rows.values()))
    lines = [
        (title, images[start : start + COLUMNS], captions.get(title, ())[start : start + COLUMNS])
        for start in range(0, most, COLUMNS)
        for title, images in rows.items()
        if start < len(images)
    ]
    columns = min(most, COLUMNS)
    left, height = 1.6, 1.4 if captions else 1.15
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(1.1 * columns + left, height * len(lines) + 0.1),
        squeeze=False,
    )  # fmt: skip
    for line, (title, images, texts) in zip(axes, lines, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
        for axis, caption in zip(line, texts, strict=False):
            axis.set_title(caption, fontsize=6, pad=2)
        for axis in line:
            axis.set_axis_off()
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    figure.subplots_adjust(
        left=(left - 0.1) / (1.1 * columns + left),
        right=0.99,
        bottom=0.01,
        top=1 - 0.2 / (height * len(lines)) if captions else 0.98,
        hspace=0.22 if captions else 0.05,
    )
    save(figure, out, dpi=160 if captions else 130)


def list_images(paths: Sequence[str]) -> list[Member]:
    """The files among paths, and the images in the folders among them, at any depth, sorted; what
    an import would pass over is named."""
    images = []
    for path in map(os.fsencode, paths):
        walk = image_walk.Walk()
        if not os.path.isdir(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"{text(path)} is no regular file")
            images.append(Member(text(path), path, OWN_FILE, -1, -1))
            continue
        walk.folder(path)
        members = walk.columns.members().sorted()
        lines = walk.passed.lines()
        if not len(members):
            raise UserError(
                "; ".join(
                    [f"{text(path)} holds no images ({', '.join(user_images.EXTENSIONS)})", *lines]
                )
            )
        for line in lines:
            cli.say(f"{text(path)}: {line}")
        images += [replace(m, id=os.path.join(text(path), m.id)) for m in members]
    return images


def spread(items: Sequence, count: int, flag: str = "--count") -> list:
    """`count` of the items, evenly spread, because neighbours may be of one class; says so."""
    if len(items) > count:
        print(f"{count} of {len(items)} images, evenly spread; {flag}=N takes another number")
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def read_pictures(images: Sequence[Member], size: int) -> np.ndarray:
    """Images, read as an import does, as their central size×size pixels (B, size, size, 3)."""
    pictures = []
    for member in images:
        try:
            image = user_images.rgb(member.read())
        except (OSError, ValueError) as e:
            raise UserError(f"{member.id}: {e}") from None
        pictures.append(views.centre_crop(image, size, size, squash=False))
    return np.stack(pictures)


def label(member: Member) -> str:
    """Folder and name of an image, short enough to stand above it."""
    name = "/".join(Path(member.id).with_suffix("").parts[-2:])
    return name if len(name) <= 18 else f"{name[:10]}…{name[-7:]}"


def show_tokens(encoder: load.Encoder, files, args):
    files = spread(files, args.count)
    pictures = read_pictures(files, encoder.model.image_size)
    tokens = np.asarray(encoder.tokens(pictures))[:, 1:]
    mask, colours = foreground(tokens)
    shape = (len(pictures), encoder.model.grid, -1, 3)
    rows = {
        "image": pictures,
        "tokens": pca_colours(tokens).reshape(shape),
        "foreground": colours.reshape(shape),
    }
    shares = [f"{share:.0%} of the patches" for share in mask.mean(axis=1)]
    return rows, {"image": list(map(label, files)), "foreground": shares}


def show_attention(encoder: load.Encoder, files, args):
    files = spread(files, args.count)
    pictures = read_pictures(files, encoder.model.image_size)
    attention = cls_attention(encoder, pictures)
    side = encoder.model.grid
    maps = attention[:, :, 1:].reshape(*attention.shape[:2], side, side)
    rows = {"image": pictures, "mean of heads": heat(maps.mean(axis=1))}
    captions = {
        "image": list(map(label, files)),
        "mean of heads": [f"CLS itself {x:.0%}" for x in attention[:, :, 0].mean(axis=1)],
    }
    for head in range(maps.shape[1]):
        rows[f"head {head + 1}"] = heat(maps[:, head])
        largest = maps[:, head].max(axis=(1, 2))
        captions[f"head {head + 1}"] = [f"brightest {x:.1%}" for x in largest]
    return rows, captions


def show_neighbours(encoder: load.Encoder, files, args):
    if len(files) < 2:
        raise UserError("--show=neighbours needs at least 2 images")
    gallery, size = spread(files, args.gallery, "--gallery"), encoder.model.image_size
    features = [
        np.asarray(encoder.features(read_pictures(batch, size), args.features))
        for batch in batched(gallery, load.CHUNK)
    ]
    queries = spread(range(len(gallery)), args.count)
    nearest, cosines = neighbours(np.concatenate(features), args.neighbours, of=queries)
    rows, captions = {}, {}
    for query, indices, values in zip(queries, nearest, cosines, strict=True):
        line = [gallery[i] for i in (query, *indices)]
        first, *others = map(label, line)
        rows[title := f"image {len(rows) + 1}"] = read_pictures(line, size)
        captions[title] = [first, *map("{}\n{:.3f}".format, others, values)]
    return rows, captions


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def stored(args, model):
    """(pictures, decoded tokens, orders, whether there is a CLS token) of --count examples of a
    token store."""
    info = token_store.StoreInfo.load(args.store)
    token_store.refuse_unfinished(args.store)
    source = records.Split(args.store, token_store.view_split(args.view))
    pictures, tokens, orders = [], [], []
    for index in spread(range(len(source)), args.count):
        record = source[index]
        image = bad_records.picture(source, index, record)
        pictures.append(views.resize(image, model.image_size, model.image_size))
        tokens.append(record["tokens"])
        rng = examples.generator(args.seed, examples.ORDER, index)
        orders.append(segments.sample_order(rng, model.segments))
    decoded = np.asarray(info.load_codec(args.store).decode(np.stack(tokens)), np.float32)
    return np.stack(pictures), decoded, np.stack(orders), info.cls


def show_predictions(args):
    model = load.load_digpt(args.checkpoint)
    pictures, tokens, orders, cls = stored(args, model.model)
    if (width := tokens.shape[-1]) != (has := model.module.out_width):
        raise UserError(
            f"{args.store} holds tokens of {width} channels, {args.checkpoint} predicts {has}"
        )
    maps = prediction_maps(model, pictures, tokens, orders, cls)
    shape = model.model.segments
    rows = prediction_rows(maps, pictures, orders, shape)
    guess = mean_token_cosine(maps)  # without it a cosine says little
    rows["mean token: cosine"] = heat(guess, 0.0, 1.0)
    return rows, prediction_captions(maps, guess, orders, shape)


SHOWN = {"tokens": show_tokens, "attention": show_attention, "neighbours": show_neighbours}


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=cli.path, help="work directory or weights")
    parser.add_argument("images", type=cli.path, nargs="*", help="image files or folders")
    parser.add_argument("--show", choices=(*SHOWN, "predictions"), default="tokens")
    parser.add_argument("--out", type=cli.local_path, required=True, help="PNG file")
    parser.add_argument("--count", type=int, default=12, help=f"images shown, at most {MOST}")
    parser.add_argument("--neighbours", type=int, default=6, help="of each image")
    parser.add_argument("--gallery", type=int, default=1000, help="images to find neighbours in")
    parser.add_argument("--features", choices=("cls", "mean"), default="mean", help="of neighbours")
    parser.add_argument("--store", type=cli.path, help="token store, for predictions")
    parser.add_argument("--view", type=int, least=0, default=0, help="view of the store")
    parser.add_argument("--seed", type=int, least=0, default=0, help="of the orders of segments")
    args = parser.parse_intermixed_args()
    for name, allowed in (
        ("count", range(1, MOST + 1)), ("neighbours", range(1, COLUMNS)),
        ("gallery", range(2, sys.maxsize)),
    ):  # fmt: skip
        if (value := getattr(args, name)) not in allowed:
            raise UserError(f"--{name}={value}: must be from {allowed[0]} to {allowed[-1]}")
    if args.show == "predictions" and (args.images or not args.store):
        raise UserError("--show=predictions takes --store=TOKENS and no images")
    if args.show != "predictions" and (args.store or not args.images):
        raise UserError(f"--show={args.show} takes images, and no --store")
    return args


def main():
    args = parse()
    outputs.file(args.out, FORMATS)
    if args.show == "predictions":
        rows, captions = show_predictions(args)
    else:
        files = list_images(args.images)
        encoder = load.load_encoder(args.checkpoint)
        for note in encoder.notes:
            cli.say(note)
        rows, captions = SHOWN[args.show](encoder, files, args)
    grid(rows, args.out, captions)
    print(f"wrote {args.out}")
    print(f"next: look at {args.out}; other pictures with --show={'|'.join(SHOWN)}|predictions")


if __name__ == "__main__":
    cli.run(main)
