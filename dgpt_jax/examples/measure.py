"""Measures frozen features of the quickstart's encoders by kNN and logistic regression.

    python -m dgpt_jax.examples.measure OUT NAME… --images=scenes

OUT is the quickstart's directory, NAME an encoder of ROWS. Writes OUT/accuracy/NAME.json:
{"knn 5": [accuracy in percent for each subset of labels], …}.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import json
from functools import partial
from pathlib import Path

import jax

from dgpt_jax import cli
from dgpt_jax.examples import image_sets, small_images
from dgpt_jax.examples.small_images import Encoder
from dgpt_jax.models import teacher_vit
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import atomic, output_paths
from dgpt_jax.weights import api, teacher_loading

# Names of the encoders, and of their rows in the table.
ROWS = {
    "raw": "raw pixels",
    "untrained": "untrained encoder",
    "pixels": "iGPT (pixels)",
    "visible": "D-iGPT visible only",
    "next": "D-iGPT next only",
    "both": "D-iGPT both",
    "teacher": "the teacher",
}
RAW_BLOCK = 2  # as accurate as all pixels of a scene, and a quarter of the time


def open_encoder(out: Path, name: str) -> Encoder:
    """Feature function of an encoder of ROWS."""
    if name == "raw":
        return jax.jit(partial(small_images.raw_pixels, block=RAW_BLOCK))
    if name == "teacher":
        teacher = teacher_loading.load(str(out / "teacher"))
        return jax.jit(lambda x: teacher_vit.teacher_tokens(teacher.tower, teacher.params, x)[:, 0])
    trained = api.load_encoder(out / "runs" / ("pixels" if name == "untrained" else name))
    encoder = api.untrained(trained.model, seed=0) if name == "untrained" else trained
    return jax.jit(partial(encoder.features, pooling="mean"))


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("out", type=cli.local_path, help="the quickstart's directory")
    parser.add_argument("names", nargs="+", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--images", required=True, choices=image_sets.SETS, help="image set")
    args = parser.parse_args()
    output_paths.directory(args.out / "accuracy")
    images, bar = small_images.read_splits(args.out, args.images), progress.Progress("fit")
    (args.out / "accuracy").mkdir(exist_ok=True)
    for number, name in enumerate(args.names):
        banks = small_images.feature_banks(open_encoder(args.out, name), images)

        def show(done: int, total: int, row: dict, name: str = name, number: int = number):
            bar.show(
                number * total + done,
                len(args.names) * total,
                f"{ROWS[name]}, {row['protocol']}, {row['shots']} labels: {row['accuracy']:.1f} %",
            )

        values = small_images.accuracies(banks, show)
        lines = {f"{protocol} {shots}": x for (protocol, shots), x in values.items()}
        atomic.write_text(args.out / "accuracy" / f"{name}.json", json.dumps(lines) + "\n")
    bar.close()
    print(f"next: look at {args.out}/accuracy")


if __name__ == "__main__":
    cli.run(main)
