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
import visualize
from PIL import Image

from dgpt_jax import cli, clip, config, evaluate, load, metrics, records, schema, views
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
    with log.open("a") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


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
            settings = schema.parse(
                config.Evaluate,
                dict(
                    data="digits",
                    protocol=protocol,
                    shots=(5, 50, 0),
                    seeds=tuple(range(5)),
                    k=(20,),
                ),
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


def pictures_of_runs(out: Path, images: dict):
    """loss.png, accuracy.png's companion tokens.png: what the encoders' tokens look like."""
    runs = [out / "runs" / name for name in RUNS]
    plot.curves(runs, ["next", "visible", "heldout/next", "heldout/visible"], out / "losses.png")
    pictures = images["test"][0][:12]
    rows = {"image": pictures}
    encoders = {name: load.load_encoder(out / "runs" / name) for name in ("both", "pixels")}
    encoders = {"untrained": load.untrained(encoders["both"].model, seed=0)} | encoders
    for name, encoder in encoders.items():
        tokens = np.asarray(encoder.tokens(pictures))[:, 1:]
        side = encoder.model.grid
        rows[name] = visualize.pca_colours(tokens).reshape(len(pictures), side, side, 3)
    visualize.grid(rows, out / "tokens.png")


def export(out: Path, images: dict):
    """The encoder in timm's layout, loaded again: the same features."""
    log = out / "logs" / "convert.txt"
    run(log, "tools/convert.py", out / "runs" / "both", out / "timm", "--to=timm")
    pictures = images["test"][0][:64]
    ours = load.load_encoder(out / "runs" / "both").features(pictures, "mean")
    again = load.load_encoder(out / "timm").features(pictures, "mean")
    say(f"export: features differ by at most {float(jnp.abs(ours - again).max()):.1e}")


def run(log: Path, *parts):
    finish(command(*parts, log=log), log)


def main():
    made = cli.parser(__doc__)
    made.add_argument("--out", default="quickstart_run", help="directory for everything")
    made.add_argument("--steps", type=int, help="steps of each pretraining; default: the config's")
    args = made.parse_args()
    out, started = Path(args.out).resolve(), time.monotonic()
    if out.exists():
        raise UserError(f"{out} is already there: remove it, or choose another --out")
    logs = out / "logs"
    say(f"everything goes to {out}")
    write_digits(out / "pictures")
    run(logs / "import.txt", "tools/import_images.py", out / "pictures", f"--out={out / 'digits'}")
    images = {split: read_pictures(out / "digits", split) for split in ("train", "test")}
    say("training the teacher (supervised: it sees the training labels)")
    train_teacher(out / "digits", out / "teacher", steps=args.steps or 300)
    shared = (
        "tools/build_tokens.py", "--config=configs/quickstart_tokens.py",
        f"--config.source={out / 'digits'}", f"--config.teacher.weights={out / 'teacher'}",
    )  # fmt: skip
    run(logs / "tokens.txt", *shared, f"--out={out / 'tokens'}")
    run(
        logs / "tokens.txt", *shared, f"--out={out / 'tokens_test'}",
        "--config.split=test", "--config.views=1",
    )  # fmt: skip
    verify = ("tools/verify_tokens.py", out / "tokens", f"--weights={out / 'teacher'}")
    run(logs / "verify.txt", *verify)
    pretrain(out, args.steps)
    say("measuring")
    table = measure(feature_sets(out, images))
    text = print_table(table)
    (out / "accuracy.md").write_text(text + "\n")
    bar_chart(table, out / "accuracy.png")
    export(out, images)
    pictures_of_runs(out, images)
    print(
        f"\nAccuracy on {len(images['test'][0])} held-out digits, %, by labels a class:\n\n{text}\n"
    )
    say(f"done in {metrics.duration(time.monotonic() - started)}: tables and pictures in {out}")
    print(f"next: look at {out}/accuracy.png, losses.png, tokens.png; load {out}/timm in timm")


if __name__ == "__main__":
    cli.run(main)
