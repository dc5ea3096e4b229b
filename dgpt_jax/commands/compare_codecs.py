"""Compares token codecs and image encodings: bytes per view and loss.

    python tools/compare_codecs.py                                   simulated tokens
    python tools/compare_codecs.py --images=IMAGES --weights=CLIP_DIR    a teacher's tokens

Cosines are between decoded and exact tokens, over all channels and without the largest (more than
10 times the median RMS), which would hide the others. Simulated tokens: 257 × 1024 normal numbers,
six channels 20 to 50 times the others. Images: their tokens against those of the unencoded crop.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import time

import numpy as np

from dgpt_jax import cli, invocation
from dgpt_jax.config import roots
from dgpt_jax.config.schema import parse
from dgpt_jax.data import image_ops, token_codec
from dgpt_jax.monitoring import markdown
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import views, writer
from dgpt_jax.tokens.teacher import Teacher
from dgpt_jax.weights import flags

IMAGES = {"IN-1K": 1_281_167, "IN-21K": 14_197_122}
VIEWS = (1, 8, 16)


def simulated(examples: int) -> np.ndarray:
    """Returns tokens (examples, 257, 1024) with heavy-tailed channels, like CLIP's."""
    rng = np.random.default_rng(0)
    size = np.exp(0.3 * rng.standard_normal(1024))
    size[rng.choice(1024, 6, replace=False)] *= rng.uniform(20, 50, 6)
    return (rng.standard_normal((examples, 257, 1024)) * size).astype(np.float32)


def ordinary_channels(tokens: np.ndarray) -> np.ndarray:
    """Returns a mask, bool (C,), of the channels without the largest."""
    rms = np.sqrt(np.square(tokens, dtype=np.float64).mean(axis=tuple(range(tokens.ndim - 1))))
    return rms <= 10 * np.median(rms)


def compare_tokens(tokens: np.ndarray, pca: int | None, image_bytes: float):
    """Prints a line per codec, fitted on one half of the tokens and measured on the other."""
    fitted, held_out = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    ordinary = ordinary_channels(tokens)
    print(
        f"tokens {tokens.shape[1]}×{tokens.shape[2]}, {int((~ordinary).sum())} large channels;",
        end=" ",
    )
    print(f"images of {image_bytes / 1e3:.1f} kB\n")
    columns = ("codec", "kB per view", "cosine: least, median", "without large channels")
    totals = (f"TB of {name}: K = {', '.join(map(str, VIEWS))}" for name in IMAGES)
    print(markdown.header((*columns, *totals)))
    kinds = [("float16", None), ("int8", None), ("int4", None)]
    kinds += [("int8", pca), ("int4", pca)] if pca else []
    for name, axes in kinds:
        codec, variance = token_codec.fit(fitted, name, axes)
        stored = codec.encode(held_out)
        decoded = np.asarray(codec.decode(stored))
        if codec.basis is not None:  # in all channels again
            decoded = decoded @ codec.basis.T
        cosines = [
            token_codec.cosines(decoded[..., channels], held_out[..., channels])
            for channels in (slice(None), ordinary)
        ]
        size = stored[0].nbytes + image_bytes + writer.OVERHEAD
        label = name if axes is None else f"{name}, PCA {axes} ({variance:.1%})"
        costs = (", ".join(f"{size * n * k / 1e12:.2f}" for k in VIEWS) for n in IMAGES.values())
        columns = (f"{c.min():.4f}, {np.median(c):.5f}" for c in cosines)
        print(markdown.row((label, f"{size / 1e3:.0f}", *columns, *costs)))


def compare_images(crops: np.ndarray, teacher: Teacher | None) -> float:
    """Prints a line per encoding; returns the mean bytes of the default one."""
    exact = teacher(crops) if teacher else None
    print(
        markdown.header(
            ("image", "kB", "PSNR, dB", "cosine: least, median", "ms to encode, decode")
        )
    )
    default = 0.0
    for kind in image_ops.ENCODINGS:
        start = time.perf_counter()
        data = [image_ops.encode_image(crop, kind) for crop in crops]
        encoded = time.perf_counter()
        decoded = np.stack([image_ops.decode_image(d) for d in data])
        ms = np.diff([start, encoded, time.perf_counter()]) / len(crops) * 1e3
        error = np.square(decoded.astype(float) - crops).mean(axis=(1, 2, 3))
        noise = f"{np.median(10 * np.log10(255**2 / error)):.1f}" if error.all() else "exact"
        cosines = "-"
        if teacher and exact is not None:
            values = token_codec.cosines(teacher(decoded), exact)
            cosines = f"{values.min():.4f}, {np.median(values):.5f}"
        size = np.mean([len(d) for d in data])
        default = default or float(size)
        times = f"{ms[0]:.2f}, {ms[1]:.2f}"
        print(markdown.row((kind, f"{size / 1e3:.1f}", noise, cosines, times)))
    print()
    return default


def draw_crops(settings: roots.TokensConfig, examples: int) -> np.ndarray:
    """Returns the first views of examples spread over the source, unencoded."""
    source = tfds_dataset.Split(settings.source, settings.split)
    crops = []
    for index in np.unique(np.linspace(0, len(source) - 1, examples).astype(int)):
        image = image_ops.decode_image(source[index]["image"])
        view = views.draw(settings, int(index), 0, *image.shape[:2])
        crops.append(image_ops.render(image, view, settings.image_size))
    return np.stack(crops)


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("--images", type=cli.path, help="image dataset of the crops")
    parser.add_argument("--split", default="train", help="its split; may be a slice")
    parser.add_argument("--weights", type=cli.path, help="the teacher's weights; needs --images")
    flags.add_teacher(parser)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--pca", type=int, help="also measure this number of principal axes")
    args = parser.parse_args()
    if args.weights and not args.images:
        parser.error("--weights needs --images")
    if not args.weights and (names := flags.given_teacher(args)):
        parser.error(f"--{names[0]} needs --weights")
    teacher, image_bytes = None, 26e3
    if args.images:
        settings = parse(roots.TokensConfig, {"source": args.images, "split": args.split})
        crops = draw_crops(settings, args.examples)
        if args.weights:
            teacher = Teacher(flags.teacher_config(args), min(16, args.examples))
        image_bytes = compare_images(crops, teacher)
    tokens = teacher(crops) if teacher else simulated(args.examples)
    compare_tokens(tokens, args.pca, image_bytes)
    tokens = invocation.command("tokens")
    print(f"\nnext: set config.codec, config.pca and config.image_encoding of {tokens}")


if __name__ == "__main__":
    cli.run(main)
