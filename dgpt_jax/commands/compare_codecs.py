"""What a stored view costs and what it loses, by token codec and by picture encoding.

    python tools/compare_codecs.py                                   simulated tokens
    python tools/compare_codecs.py --images=IMAGES --weights=CLIP_DIR    a teacher's

Cosines are between decoded and exact tokens, once in all channels and once without the largest
(those of more than 10 times the median size), which would hide what happens to the others.
Simulated: 257 × 1024 normal numbers with six channels 20 to 50 times the rest. For pictures: their
tokens against those of the crop that was never encoded.
"""

import dgpt_jax.starting  # noqa: F401

import time

import numpy as np

from dgpt_jax import cli, config, records, token_codec, token_writer, views
from dgpt_jax.schema import parse
from dgpt_jax.teacher import Teacher

IMAGES = {"IN-1K": 1_281_167, "IN-21K": 14_197_122}
VIEWS = (1, 8, 16)


def simulated(examples: int) -> np.ndarray:
    """Tokens (examples, 257, 1024) with heavy-tailed channels, as CLIP has them."""
    rng = np.random.default_rng(0)
    size = np.exp(0.3 * rng.standard_normal(1024))
    size[rng.choice(1024, 6, replace=False)] *= rng.uniform(20, 50, 6)
    return (rng.standard_normal((examples, 257, 1024)) * size).astype(np.float32)


def ordinary_channels(tokens: np.ndarray) -> np.ndarray:
    """Which of C channels are not among the largest."""
    rms = np.sqrt(np.square(tokens, dtype=np.float64).mean(axis=tuple(range(tokens.ndim - 1))))
    return rms <= 10 * np.median(rms)


def compare_tokens(tokens: np.ndarray, pca: int | None, picture_bytes: float):
    """Prints a line a codec: fitted on one half, measured on the other."""
    fitted, held_out = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    ordinary = ordinary_channels(tokens)
    print(
        f"tokens {tokens.shape[1]}×{tokens.shape[2]}, {int((~ordinary).sum())} large channels;",
        end=" ",
    )
    print(
        f"pictures of {picture_bytes / 1e3:.1f} kB\n\n"
        f"| codec | kB a view | cosine: least, median | without large channels | "
        + " | ".join(f"TB of {name}: K = {', '.join(map(str, VIEWS))}" for name in IMAGES)
        + " |\n|---|---|---|---|---|---|"
    )
    kinds = [("float16", None), ("int8", None), ("int4", None)]
    kinds += [("int8", pca), ("int4", pca)] if pca else []
    for name, axes in kinds:
        codec, variance = token_codec.fit(fitted, name, axes)
        stored = codec.encode(held_out)
        decoded = np.asarray(codec.decode(stored))
        if codec.basis is not None:  # in all channels again
            decoded = decoded @ codec.basis.T
        both = [
            token_codec.cosines(decoded[..., chosen], held_out[..., chosen])
            for chosen in (slice(None), ordinary)
        ]
        size = stored[0].nbytes + picture_bytes + token_writer.OVERHEAD
        label = name if axes is None else f"{name}, PCA {axes} ({variance:.1%})"
        costs = (", ".join(f"{size * n * k / 1e12:.2f}" for k in VIEWS) for n in IMAGES.values())
        cosines = (f"{c.min():.4f}, {np.median(c):.5f}" for c in both)
        print(f"| {label} | {size / 1e3:.0f} | {' | '.join(cosines)} | {' | '.join(costs)} |")


def compare_pictures(crops: np.ndarray, teacher: Teacher | None) -> float:
    """Prints a line an encoding; returns the mean bytes of the default one."""
    exact = teacher(crops) if teacher else None
    print("| picture | kB | PSNR, dB | cosine: least, median | ms to encode, decode |")
    print("|---|---|---|---|---|")
    default = 0.0
    for kind in views.ENCODINGS:
        began = time.perf_counter()
        data = [views.encode_picture(crop, kind) for crop in crops]
        encoded = time.perf_counter()
        decoded = np.stack([views.decode_picture(d) for d in data])
        took = np.diff([began, encoded, time.perf_counter()]) / len(crops) * 1e3
        error = np.square(decoded.astype(float) - crops).mean(axis=(1, 2, 3))
        noise = f"{np.median(10 * np.log10(255**2 / error)):.1f}" if error.all() else "exact"
        cosines = "-"
        if teacher:
            found = token_codec.cosines(teacher(decoded), exact)
            cosines = f"{found.min():.4f}, {np.median(found):.5f}"
        size = np.mean([len(d) for d in data])
        default = default or float(size)
        print(f"| {kind} | {size / 1e3:.1f} | {noise} | {cosines} | {took[0]:.2f}, {took[1]:.2f} |")
    print()
    return default


def draw_crops(settings: config.Tokens, examples: int) -> np.ndarray:
    """The first views of examples spread over the source, never encoded."""
    source = records.Split(settings.source, settings.split)
    crops = []
    for index in np.unique(np.linspace(0, len(source) - 1, examples).astype(int)):
        image = views.decode_picture(source[index]["image"])
        view = token_writer.draw(settings, int(index), 0, *image.shape[:2])
        crops.append(views.render(image, view, settings.picture_size))
    return np.stack(crops)


def main():
    made = cli.parser(__doc__)
    made.add_argument("--images", type=cli.path, help="image dataset to take crops from")
    made.add_argument("--split", default="train", help="its split, slices allowed")
    made.add_argument("--weights", type=cli.path, help="the teacher's weights; needs --images")
    made.add_argument("--examples", type=int, default=64)
    made.add_argument("--pca", type=int, help="also with so many principal axes")
    args = made.parse_args()
    if args.weights and not args.images:
        made.error("--weights needs --images")
    teacher, picture_bytes = None, 26e3
    if args.images:
        settings = parse(config.Tokens, {"source": args.images, "split": args.split})
        crops = draw_crops(settings, args.examples)
        if args.weights:
            teacher = Teacher(config.Teacher(weights=args.weights), min(16, args.examples))
        picture_bytes = compare_pictures(crops, teacher)
    tokens = teacher(crops) if teacher else simulated(args.examples)
    compare_tokens(tokens, args.pca, picture_bytes)
    print("\nnext: set config.codec, config.pca and config.picture of tools/build_tokens.py")


if __name__ == "__main__":
    cli.run(main)
