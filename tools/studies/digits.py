"""The quickstart's images and teacher: scikit-learn's digits as files, a small supervised tower."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from dgpt_jax import cli, records, towers, views
from dgpt_jax.convert import clip as clip_weights

with cli.needs("dgpt_jax[quickstart]"):
    from sklearn.datasets import load_digits

TEST = 360  # images of the test split, of 1,797
TOWER = towers.Tower(
    image_size=32, patch=8, width=64, depth=4, heads=2, mlp_width=256, out_width=64,
    activation="gelu",
)  # fmt: skip


def write_digits(folder: Path, size: int = 32):
    """scikit-learn's digits as size×size files folder/{train,test}/CLASS/i.{png,jpg}."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for place, i in enumerate(order):
        split = "test" if place < TEST else "train"
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


def read_pictures(dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All pictures (N, size, size, 3) and labels of a split."""
    examples = list(records.Split(dataset, split))
    pictures = np.stack([views.decode_picture(e["image"]) for e in examples])
    return pictures, np.array([e["label"] for e in examples])


def train_teacher(dataset, directory: Path, steps: int):
    """Trains a small CLIP tower against fixed random unit vectors, one a class; saves it."""
    pictures, labels = read_pictures(dataset, "train")
    size = pictures.shape[1]
    tower = dataclasses.replace(TOWER, image_size=size, patch=size // 4)
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((labels.max() + 1, tower.out_width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    init = jax.jit(towers.TeacherTower(tower).init)
    params = init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps))

    def loss(params, pictures, labels):
        cls = towers.teacher_tokens(tower, params, pictures)[:, 0]
        cls /= jnp.linalg.norm(cls, axis=1, keepdims=True)
        logits = 10 * cls @ vectors.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, pictures, labels):
        grads = jax.grad(loss)(params, pictures, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(steps):
        chosen = rng.integers(0, len(pictures), 64)
        crops = []
        for picture in pictures[chosen]:
            view = views.draw(rng, size, size, scale=(0.5, 1), ratio=(3 / 4, 4 / 3), flip=False)
            crops.append(views.render(picture, view, size))
        params, opt_state = step(params, opt_state, np.stack(crops), labels[chosen])
    clip_weights.save(directory, params, tower)
