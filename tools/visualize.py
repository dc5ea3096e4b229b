"""What an encoder sees, as pictures.

    python tools/visualize.py CHECKPOINT IMAGE… --out=FILE.png [--show=tokens]

IMAGE are files or folders; CHECKPOINT is a work directory or weights. `--show` is one of

    tokens       patch tokens as colours: the first principal components of all images together
                 are red, green and blue; below, of the foreground, which the first component tells
    attention    where CLS attends to in the last block: the mean of the heads, then each head
    neighbours   for each image the others that are nearest by the cosine of features (--features)
    predictions  what the pretraining model (a work directory with decoders) predicts of the
                 segments of pictures of a token store, beside the teacher's tokens; captions are
                 mean cosines by place in the order, below those of a constant guess:

    python tools/visualize.py RUN --show=predictions --store=TOKENS --out=FILE.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dgpt_jax import bad_records, cli, examples, load, records, segments, token_store, views
from dgpt_jax.maps import cls_attention, foreground, neighbours, pca_colours, prediction_maps
from dgpt_jax.pictures import heat, prediction_rows, teacher, unit
from dgpt_jax.schema import UserError

KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def grid(rows: dict[str, np.ndarray], out, captions: dict[str, list[str]] | None = None):
    """A picture with one titled row of images (B, height, width, 3) for each entry; captions, where
    a row has some, stand above its images."""
    captions = captions or {}
    count = max(len(images) for images in rows.values())
    left, height = 1.6, 1.4 if captions else 1.15
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.1 * count + left, height * len(rows) + 0.1), squeeze=False
    )
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
        for axis, caption in zip(line, captions.get(title, ()), strict=False):
            axis.set_title(caption, fontsize=6, pad=2)
        for axis in line:
            axis.set_axis_off()
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    figure.subplots_adjust(
        left=(left - 0.1) / (1.1 * count + left), right=0.99, bottom=0.01,
        top=1 - 0.2 / (height * len(rows)) if captions else 0.98, hspace=0.22 if captions else 0.05,
    )  # fmt: skip
    figure.savefig(out, dpi=160 if captions else 130)
    plt.close(figure)


def read_pictures(paths, size: int) -> np.ndarray:
    """Image files, and all in folders, as the central size×size pixels (B, size, size, 3)."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS)
        if not found:
            raise UserError(f"{path} holds no images ({', '.join(KINDS)})")
        files += found
    pictures = []
    for file in files:
        try:
            image = views.decode_picture(file.read_bytes())
        except (OSError, ValueError) as e:
            raise UserError(f"{file}: {e}") from None
        pictures.append(views.centre_crop(image, size, size, squash=False))
    return np.stack(pictures)


def show_tokens(encoder: load.Encoder, pictures, _args):
    tokens = np.asarray(encoder.tokens(pictures))[:, 1:]
    mask, colours = foreground(tokens)
    shape = (len(pictures), encoder.model.grid, -1, 3)
    rows = {
        "image": pictures,
        "tokens": pca_colours(tokens).reshape(shape),
        "foreground": colours.reshape(shape),
    }
    return rows, {"foreground": [f"{share:.0%} of the patches" for share in mask.mean(axis=1)]}


def show_attention(encoder: load.Encoder, pictures, _args):
    attention = cls_attention(encoder, pictures)
    side = encoder.model.grid
    maps = attention[:, :, 1:].reshape(*attention.shape[:2], side, side)
    rows = {"image": pictures, "mean of heads": heat(maps.mean(axis=1))}
    captions = {"mean of heads": [f"CLS itself {x:.0%}" for x in attention[:, :, 0].mean(axis=1)]}
    for head in range(maps.shape[1]):
        rows[f"head {head + 1}"] = heat(maps[:, head])
        largest = maps[:, head].max(axis=(1, 2))
        captions[f"head {head + 1}"] = [f"brightest {x:.1%}" for x in largest]
    return rows, captions


def show_neighbours(encoder: load.Encoder, pictures, args):
    if len(pictures) < 2:
        raise UserError("--show=neighbours needs at least 2 images")
    features = np.asarray(encoder.features(pictures, args.features))
    nearest, cosines = neighbours(features, min(args.count, len(pictures) - 1))
    rows, captions = {}, {}
    for i, near in enumerate(nearest):
        rows[title := f"image {i + 1}"] = pictures[[i, *near]]
        captions[title] = ["", *(f"image {n + 1}: {cosines[i, j]:.3f}" for j, n in enumerate(near))]
    return rows, captions


def stored(args, model):
    """(pictures, decoded tokens, orders, whether there is a CLS token) of a token store's first."""
    info = token_store.StoreInfo.load(args.store)
    token_store.refuse_unfinished(args.store)
    source = records.Split(args.store, token_store.view_split(args.view))
    pictures, tokens, orders = [], [], []
    for index in range(min(args.count, len(source))):
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
    captions = {
        f"{name}: cosine": per_place(found["similarity"], orders, shape, name)
        for name, found in maps.items()
    }
    # What a constant guess has: without it a cosine says little.
    tokens = unit(teacher(maps))
    guess = tokens @ unit(np.nanmean(tokens, axis=(0, 1, 2)))
    rows["mean token: cosine"] = heat(guess, 0.0, 1.0)
    for name in maps:
        lines = per_place(guess, orders, shape, name)
        before = captions.setdefault("mean token: cosine", [""] * len(lines))
        pairs = zip(before, lines, strict=True)
        captions["mean token: cosine"] = [f"{a}\n{name} {b}".strip() for a, b in pairs]
    return rows, captions


def per_place(maps: np.ndarray, orders: np.ndarray, shape, name: str) -> list[str]:
    """The mean of maps (B, G, G) over each segment, by place in the order, as captions."""
    first = 1 if name == "next" else 0
    means = segments.split(maps[..., None], shape)[..., 0].mean(axis=-1)
    lines = []
    for of_image, order in zip(means, orders, strict=True):
        places = order[first : first + segments.visible_count(shape)]
        lines.append(" ".join(f"{of_image[segment]:.2f}" for segment in places))
    return lines


SHOWN = {"tokens": show_tokens, "attention": show_attention, "neighbours": show_neighbours}


def main():
    made = cli.parser(__doc__)
    made.add_argument("checkpoint", help="work directory or weights")
    made.add_argument("images", nargs="*", help="image files or folders")
    made.add_argument("--show", choices=(*SHOWN, "predictions"), default="tokens")
    made.add_argument("--out", required=True, help="PNG file")
    made.add_argument("--count", type=int, default=6, help="neighbours, or pictures of the store")
    made.add_argument("--features", choices=("cls", "mean"), default="mean", help="of neighbours")
    made.add_argument("--store", help="token store, for predictions")
    made.add_argument("--view", type=int, default=0, help="view of the store")
    made.add_argument("--seed", type=int, default=0, help="of the orders of segments")
    args = made.parse_intermixed_args()
    if args.count < 1:
        raise UserError(f"--count={args.count}: must be at least 1")
    if args.show == "predictions":
        if not args.store or args.images:
            raise UserError("--show=predictions takes --store=TOKENS and no images")
        rows, captions = show_predictions(args)
    else:
        if not args.images or args.store:
            raise UserError(f"--show={args.show} takes images, and no --store")
        encoder = load.load_encoder(args.checkpoint)
        pictures = read_pictures(args.images, encoder.model.image_size)
        rows, captions = SHOWN[args.show](encoder, pictures, args)
    grid(rows, args.out, captions)
    print(f"wrote {args.out}")
    print(f"next: look at {args.out}; other pictures with --show={'|'.join(SHOWN)}|predictions")


if __name__ == "__main__":
    cli.run(main)
