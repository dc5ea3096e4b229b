"""scikit-learn's digits as image files, and a small supervised teacher for them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.data import image_ops
from dgpt_jax.models import teacher_vit
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.weights.layouts import clip as clip_weights

with cli.needs("dgpt_jax[quickstart]"):
    from sklearn.datasets import load_digits

TEST_SIZE = 360  # of 1,797 images
TOWER = teacher_vit.TeacherArchitecture(
    image_size=32, patch=8, width=64, depth=4, heads=2, mlp_width=256, out_width=64,
    activation="gelu",
)  # fmt: skip


def write_digits(folder: Path, size: int = 32):
    """Writes the digits, size×size pixels, to folder/{train,test}/CLASS/i.{png,jpg}."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for rank, i in enumerate(order):
        split = "test" if rank < TEST_SIZE else "train"
        image = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        save(image, folder / split / str(digits.target[i]) / f"{i:04d}", lossless=bool(i % 2))


def save(image: Image.Image, path: Path, *, lossless: bool):
    """Writes path.png or path.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if lossless:
        image.save(f"{path}.png")
    else:
        image.save(f"{path}.jpg", quality=95)


def read_images(dataset: Path | str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 (N, size, size, 3), and labels (N,) of a split."""
    examples = list(tfds_dataset.Split(dataset, split))
    images = np.stack([image_ops.decode_image(e["image"]) for e in examples])
    return images, np.array([e["label"] for e in examples])


def train_teacher(dataset: Path | str, directory: Path, steps: int):
    """Trains a small CLIP tower to predict one fixed random unit vector per class, and saves it."""
    images, labels = read_images(dataset, "train")
    size = images.shape[1]
    tower = dataclasses.replace(TOWER, image_size=size, patch=size // 4)
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((labels.max() + 1, tower.token_width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    init = jax.jit(teacher_vit.TeacherViT(tower).init)
    params = init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps))

    def loss(params, images, labels):
        cls = teacher_vit.teacher_tokens(tower, params, images)[:, 0]
        cls /= jnp.linalg.norm(cls, axis=1, keepdims=True)
        logits = 10 * cls @ vectors.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels):
        grads = jax.grad(loss)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(steps):
        batch = rng.integers(0, len(images), 64)
        crops = []
        for image in images[batch]:
            view = image_ops.draw_view(
                rng, size, size, scale=(0.5, 1), ratio=(3 / 4, 4 / 3), flip=False
            )
            crops.append(image_ops.render(image, view, size))
        params, opt_state = step(params, opt_state, np.stack(crops), labels[batch])
    clip_weights.save(directory, params, tower)
