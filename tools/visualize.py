"""What an encoder sees: patch tokens of images as colours, by a joint PCA.

    python tools/visualize.py CHECKPOINT IMAGE… --out=FILE.png

The three first principal components of the patch tokens of all images together are red, green and
blue. CHECKPOINT is a work directory or timm safetensors.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dgpt_jax import cli, load, views
from dgpt_jax.schema import UserError


def pca_colours(tokens: np.ndarray) -> np.ndarray:
    """Patch tokens (B, N, D) to colours (B, N, 3): each component over its 2nd-98th percentile."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, _, basis = np.linalg.svd(flat, full_matrices=False)
    components = flat @ basis[:3].T
    low, high = np.percentile(components, [2, 98], axis=0)
    colours = np.clip((components - low) / np.maximum(high - low, 1e-9), 0, 1)
    return colours.reshape(*tokens.shape[:2], 3)


def grid(rows: dict[str, np.ndarray], out):
    """A picture with one titled row of images (B, height, width, 3) for each entry."""
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.1 * count + 1.6, 1.15 * len(rows)), squeeze=False
    )
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
        for axis in line:
            axis.set_axis_off()
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    figure.subplots_adjust(left=1.5 / (1.1 * count + 1.6), right=0.99, top=0.98, bottom=0.02)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main():
    made = cli.parser(__doc__)
    made.add_argument("checkpoint")
    made.add_argument("images", nargs="+")
    made.add_argument("--out", required=True, help="PNG file")
    args = made.parse_args()
    encoder = load.load_encoder(args.checkpoint)
    size = encoder.model.image_size
    pictures = []
    for path in args.images:
        try:
            with open(path, "rb") as file:
                image = views.decode_picture(file.read())
        except (OSError, ValueError) as e:
            raise UserError(f"{path}: {e}") from None
        pictures.append(views.centre_crop(image, size, size, squash=False))
    tokens = np.asarray(encoder.tokens(np.stack(pictures)))[:, 1:]
    colours = pca_colours(tokens).reshape(len(pictures), encoder.model.grid, -1, 3)
    grid({"image": np.stack(pictures), "tokens": colours}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
