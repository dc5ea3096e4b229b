"""The whole job on real images, on a laptop: digits → tokens → pretraining → numbers → PyTorch.

scikit-learn's 1,797 handwritten digits become image files, a dataset, and a token store of 4 views
from a small CLIP-shaped teacher that is trained on the spot. Four tiny encoders are pretrained:
D-iGPT with both losses, with `next` and with `visible` alone, and iGPT's pixel target. Then kNN and
linear probes on held-out digits, the export, and pictures. The teacher is a supervised one: it has
seen the training labels. Neither it nor any encoder sees the test split.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plot
from PIL import Image

from dgpt_jax import clip, config, evaluate, load, records, views
from dgpt_jax.convert import clip as clip_weights
from dgpt_jax.schema import UserError

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("both", "next", "visible", "pixels")
TEST = 360  # of 1,797
TOWER = clip.Tower(
    image_size=32, patch=4, width=64, depth=4, heads=2, mlp_width=256, out_width=64,
    activation="gelu",
)  # fmt: skip


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def command(*parts, log: Path, core: int | None = None) -> subprocess.Popen:
    """Starts a command of the README, its output in a log; on one core if told so."""
    words = [sys.executable, *map(str, parts)]
    say(f"$ python {' '.join(words[1:])}".replace(f"{ROOT}/", ""))
    log.parent.mkdir(parents=True, exist_ok=True)
    pin = None
    if core is not None and hasattr(os, "sched_setaffinity"):
        pin = lambda: os.sched_setaffinity(0, {core})  # noqa: E731
    with log.open("a") as file:
        return subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=pin
        )


def finish(process: subprocess.Popen, log: Path):
    if process.wait():
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise UserError(f"the command above failed, see {log}:\n{tail}")


def write_digits(folder: Path):
    """scikit-learn's digits as 32×32 files folder/{train,test}/CLASS/i.{png,jpg}."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for place, i in enumerate(order):
        split = "test" if place < TEST else "train"
        path = folder / split / str(digits.target[i])
        path.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
        image = image.resize((32, 32), Image.Resampling.BICUBIC)
        if i % 2:
            image.save(path / f"{i:04d}.png")
        else:
            image.save(path / f"{i:04d}.jpg", quality=95)


def read_pictures(dataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All pictures (N, 32, 32, 3) and labels of a split."""
    source = records.Split(dataset, split)
    examples = [source[i] for i in range(len(source))]
    pictures = np.stack([views.decode_picture(e["image"]) for e in examples])
    return pictures, np.array([e["label"] for e in examples])


def train_teacher(dataset, directory: Path, steps: int):
    """Trains a small CLIP tower against ten fixed random unit vectors, one a class; saves it."""
    pictures, labels = read_pictures(dataset, "train")
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((10, TOWER.out_width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    init = jax.jit(clip.ClipTower(TOWER).init)
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps))

    def loss(params, pictures, labels):
        cls = clip.teacher_tokens(TOWER, params, pictures)[:, 0]
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
            view = views.draw(rng, 32, 32, scale=(0.5, 1), ratio=(3 / 4, 4 / 3), flip=False)
            crops.append(views.render(picture, view, 32))
        params, opt_state = step(params, opt_state, np.stack(crops), labels[chosen])
    clip_weights.save(directory, params, TOWER)


def pretrain(out: Path, steps: int | None):
    """Runs the four trainings, as many at once as there are cores, each on its own."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    waiting, running = list(RUNS), {}
    while waiting or running:
        free = [core for core in cores if core not in running]
        if waiting and free:
            name, core = waiting.pop(0), free[0]
            log = out / "logs" / f"train_{name}.txt"
            pixels = name == "pixels"
            parts = [
                "-m", "dgpt_jax.train", f"--config=configs/quickstart.py:{name}",
                f"--workdir={out / 'runs' / name}",
                f"--config.data.path={out / ('digits' if pixels else 'tokens')}",
                f"--config.evals.heldout={out / ('digits' if pixels else 'tokens_test')}",
            ]  # fmt: skip
            if steps:
                parts.append(f"--config.total={steps} steps")
            running[core] = (command(*parts, log=log, core=core), log)
            continue
        time.sleep(0.5)
        for core, (process, log) in list(running.items()):
            if process.poll() is not None:
                finish(process, log)
                del running[core]


def feature_sets(out: Path, images: dict) -> dict:
    """{name: {split: (features, labels)}} of everything that is compared."""
    tower = clip_weights.load(str(out / "teacher"))
    trained = {name: load.load_encoder(out / "runs" / name) for name in RUNS}
    model = trained["both"].model
    module = load.untrained(model, seed=0)
    encoders = {
        "raw pixels": lambda x: jnp.asarray(x, jnp.float32).reshape(len(x), -1) / 255,
        "untrained encoder": module.features,
        "iGPT (pixels)": trained["pixels"].features,
        "D-iGPT visible only": trained["visible"].features,
        "D-iGPT next only": trained["next"].features,
        "D-iGPT both": trained["both"].features,
        "the teacher": lambda x: clip.teacher_tokens(tower.tower, tower.params, x)[:, 0],
    }
    found = {}
    for name, encode in encoders.items():
        encode = jax.jit(encode)
        found[name] = {
            split: (np.asarray(encode(pictures)), labels)
            for split, (pictures, labels) in images.items()
        }
    return found


def measure(features: dict) -> dict:
    """{name: {(protocol, shots): (mean, standard error) accuracy in percent over the draws}}."""
    table = {}
    for name, splits in features.items():
        table[name] = {}
        for protocol in ("knn", "linear"):
            settings = config.parse(
                config.Evaluate,
                dict(protocol=protocol, shots=(5, 50, 0), seeds=tuple(range(5)), k=(20,)),
            )
            for row in evaluate.measure(settings, splits["train"], splits["test"]):
                table[name].setdefault((protocol, row["shots"]), []).append(row["accuracy"])
    return {
        name: {
            key: (np.mean(v), np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0)
            for key, v in columns.items()
        }
        for name, columns in table.items()
    }


def print_table(table: dict) -> str:
    columns = list(next(iter(table.values())))
    titles = [f"{protocol} {shots}" for protocol, shots in columns]
    lines = ["| features | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, cells in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{cells[c][0]:.1f}" for c in columns) + " |")
    return "\n".join(lines)


def bar_chart(table: dict, out: Path):
    figure, axes = plot.plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, protocol in zip(axes, ("knn", "linear"), strict=True):
        for i, shots in enumerate((5, 50, "all")):
            places = np.arange(len(table)) + 0.27 * (i - 1)
            means, errors = zip(*(cells[protocol, shots] for cells in table.values()), strict=True)
            axis.bar(places, means, 0.25, yerr=errors, label=f"{shots} labels a class")
        axis.set_xticks(range(len(table)), table, rotation=30, ha="right", fontsize=8)
        axis.set_title({"knn": "kNN (k = 20)", "linear": "linear probe"}[protocol])
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out digits, %")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plot.plt.close(figure)
