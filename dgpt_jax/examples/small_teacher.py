"""Trains a small supervised teacher for a small image set: a CLIP tower that predicts one fixed
random unit vector per class.

    python -m dgpt_jax.examples.small_teacher IMAGES TEACHER --images=scenes
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import cli, invocation
from dgpt_jax.data import image_ops
from dgpt_jax.examples import digits, image_sets
from dgpt_jax.models import teacher_vit
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import output_paths
from dgpt_jax.weights.layouts import clip as clip_weights

BATCH = 64
TEMPERATURE = 0.1  # of the cosines to the classes' vectors
SHOW_SECONDS = 1.0
ARCHITECTURE = teacher_vit.TeacherArchitecture(
    image_size=32, patch=8, width=64, depth=4, heads=2, mlp_width=256, out_width=64,
    activation="gelu",
)  # fmt: skip


def train(
    dataset: Path | str,
    directory: Path,
    recipe: image_sets.TeacherRecipe,
    show: Callable[[int, Any], None] = lambda step, loss: None,
):
    """Trains on the split `train` of a dataset and writes the weights to `directory`; calls `show`
    with the number of each finished step and its loss, a scalar on the device."""
    images, labels = digits.read_images(dataset, "train")
    size = images.shape[1]
    tower = dataclasses.replace(ARCHITECTURE, image_size=size, patch=size // 4)
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((labels.max() + 1, tower.token_width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    init = jax.jit(teacher_vit.TeacherViT(tower).init)
    params = init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    steps = recipe.steps
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps))

    def classify(outputs, labels):
        outputs /= jnp.linalg.norm(outputs, axis=1, keepdims=True)
        logits = outputs @ vectors.T / TEMPERATURE
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def loss(params, images, labels):
        tokens = teacher_vit.teacher_tokens(tower, params, images)
        value = classify(tokens[:, 0], labels)
        return value + classify(tokens[:, 1:].mean(1), labels) if recipe.patch_loss else value

    @jax.jit
    def train_step(params, opt_state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, augment = tx.init(params), AUGMENTATIONS[recipe.augmentation]
    for step in range(1, steps + 1):
        batch = rng.integers(0, len(images), BATCH)
        views = augment(rng, images[batch])
        params, opt_state, value = train_step(params, opt_state, views, labels[batch])
        show(step, value)
    clip_weights.save(directory, params, tower)


def shift(rng: np.random.Generator, images: np.ndarray, pixels: int = 3) -> np.ndarray:
    """Images (B, size, size, 3) moved by up to `pixels` in x and y; edges are repeated."""
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    size, offsets = images.shape[1], rng.integers(0, 2 * pixels + 1, (len(images), 2))
    return np.stack([x[i : i + size, j : j + size] for x, (i, j) in zip(padded, offsets)])


def crop(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Random crops of half to all of the area of images (B, size, size, 3), resized."""
    size = images.shape[1]
    views = []
    for image in images:
        view = image_ops.draw_view(
            rng, size, size, scale=(0.5, 1), ratio=(3 / 4, 4 / 3), flip=False
        )
        views.append(image_ops.render(image, view, size))
    return np.stack(views)


AUGMENTATIONS = {"shift": shift, "crop": crop}


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("dataset", type=cli.local_path, help="TFDS directory of the images")
    parser.add_argument("out", type=cli.local_path, help="directory of the weights")
    parser.add_argument("--images", required=True, choices=image_sets.SETS, help="its recipe")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    args = parser.parse_args()
    output_paths.directory(args.out)
    recipe = image_sets.SETS[args.images].teacher
    if args.steps:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    bar, started = progress.Progress(interval=SHOW_SECONDS), time.monotonic()

    def show(step: int, loss: Any):
        if bar.is_due() or step == recipe.steps:
            left = (time.monotonic() - started) / step * (recipe.steps - step)
            bar.show(step, recipe.steps, f"loss {loss:.3f} eta {progress.duration(left)}")

    image_sets.create_once(args.out, lambda path: train(args.dataset, path, recipe, show))
    bar.close()
    print(
        f"next: {invocation.command('tokens')} --config=quickstart_tokens "
        f"--config.teacher.weights={shlex.quote(str(args.out))}"
    )


if __name__ == "__main__":
    cli.run(main)
