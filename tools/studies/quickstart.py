"""The whole job on real images, on a laptop: digits → tokens → pretraining → numbers → PyTorch.

scikit-learn's 1,797 handwritten digits become image files, a dataset, and a token store of 4 views
from a small CLIP-shaped teacher that is trained on the spot. Four tiny encoders are pretrained:
D-iGPT with both losses, with `next` and with `visible` alone, and iGPT's pixel target. Then kNN and
linear probes on held-out digits, the export, and pictures. The teacher is a supervised one: it has
seen the training labels. Neither it nor any encoder sees the test split. With --images=glyphs the
same is done with characters in many fonts (tools/glyphs.py), tested on fonts that were not seen.
"""

import dgpt_jax.starting  # noqa: F401

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import digits
import jax
import jax.numpy as jnp
import numpy as np
import plot
import visualize
from small_images import IMAGES, accuracies, banks, once, raw_pixels

from dgpt_jax import cli, load, outputs, progress, towers
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.schema import UserError

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("both", "next", "visible", "pixels")


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the README; logs/NAME.txt gets itself as the first line, then its output."""

    name: str
    makes: Path
    words: tuple

    @property
    def line(self) -> str:
        return " ".join(["python", *map(str, self.words)])

    def done(self, logs: Path) -> bool:
        """Whether the very same command has succeeded before, and what it made is still there."""
        log = logs / f"{self.name}.txt"
        kept = self.makes.exists() and log.exists()
        return kept and log.read_text().startswith(f"{self.line}\n")

    def start(self, logs: Path, core: int | None) -> subprocess.Popen:
        with (logs / f"{self.name}.running.txt").open("w") as log:
            log.write(f"{self.line}\n")
            log.flush()
            words = [sys.executable, *map(str, self.words)]
            process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        return process

    def finish(self, logs: Path, process: subprocess.Popen):
        log = logs / f"{self.name}.running.txt"
        if process.wait():
            tail = "\n".join(log.read_text().splitlines()[-5:])
            raise UserError(f"{self.line}\nfailed, see {log}:\n{tail}")
        log.rename(logs / f"{self.name}.txt")


def run(logs: Path, *commands: Command, cores=(None,)) -> bool:
    """Runs the commands that are not done yet, one on each core; whether there were any."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [c for c in commands if not c.done(logs)]
    any_left, running = bool(waiting), {}
    for command in commands:
        if command not in waiting:
            say(f"{command.name}: done before, kept")
    try:
        while waiting or running:
            for core in cores:
                if core not in running and waiting:
                    command = waiting.pop(0)
                    say(f"$ {command.line}")
                    running[core] = command, command.start(logs, core)
                elif core in running and running[core][1].poll() is not None:
                    command, process = running.pop(core)
                    command.finish(logs, process)
            time.sleep(0.2)
    finally:  # Ctrl-C reaches the commands too: they save and end
        for _, process in running.values():
            process.wait()
    return any_left


def pretraining(out: Path, name: str, steps: int | None) -> Command:
    """The training `name` of configs/quickstart.py."""
    data = "images" if name == "pixels" else "tokens"
    words = [
        "-m", "dgpt_jax.train", f"--config=configs/quickstart.py:{name}",
        f"--workdir={out / 'runs' / name}", f"--config.data.path={out / data}",
        f"--config.evals.heldout={out / ('images' if name == 'pixels' else 'tokens_test')}",
    ]  # fmt: skip
    if steps:
        words.append(f"--config.total={steps} steps")
    return Command(f"train_{name}", out / "runs" / name / "checkpoints", tuple(words))


def token_store(out: Path, name: str, *overrides: str) -> Command:
    """A store of the teacher's tokens, by configs/quickstart_tokens.py."""
    words = (
        "tools/build_tokens.py", "--config=configs/quickstart_tokens.py", f"--out={out / name}",
        f"--config.source={out / 'images'}", f"--config.teacher.weights={out / 'teacher'}",
    )  # fmt: skip
    return Command(name, out / name / "dataset_info.json", words + overrides)


def feature_sets(out: Path, images: dict) -> dict:
    """{name: {split: Bank}} of everything that is compared."""
    teacher = teacher_weights.load(str(out / "teacher"))
    trained = {name: load.load_encoder(out / "runs" / name) for name in RUNS}
    students = {
        "untrained encoder": load.untrained(trained["both"].model, seed=0),
        "iGPT (pixels)": trained["pixels"],
        "D-iGPT visible only": trained["visible"],
        "D-iGPT next only": trained["next"],
        "D-iGPT both": trained["both"],
    }
    encoders = {
        "raw pixels": raw_pixels,
        **{name: partial(student.features, pooling="mean") for name, student in students.items()},
        "the teacher": lambda x: towers.teacher_tokens(teacher.tower, teacher.params, x)[:, 0],
    }
    return {name: banks(jax.jit(encode), images) for name, encode in encoders.items()}


def measure(features: dict) -> dict:
    """{name: {(protocol, shots): (mean, standard error) accuracy in percent over the draws}}."""
    return {
        name: {
            key: (np.mean(v), np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0)
            for key, v in accuracies(splits).items()
        }
        for name, splits in features.items()
    }


def pictures_of_runs(out: Path, images: dict):
    """loss.png, accuracy.png's companion tokens.png: what the encoders' tokens look like."""
    runs = [out / "runs" / name for name in RUNS]
    plot.curves(runs, ["next", "visible", "heldout/next", "heldout/visible"], out / "losses.png")
    pictures, labels = images["test"]
    shown = np.unique(labels)[:: max(1, len(np.unique(labels)) // 10)][:10]
    pictures = pictures[[np.flatnonzero(labels == label)[0] for label in shown]]
    rows = {"image": pictures}
    encoders = {name: load.load_encoder(out / "runs" / name) for name in ("both", "pixels")}
    encoders = {"untrained": load.untrained(encoders["both"].model, seed=0)} | encoders
    for name, encoder in encoders.items():
        tokens = np.asarray(encoder.tokens(pictures))[:, 1:]
        side = encoder.model.grid
        rows[name] = visualize.pca_colours(tokens).reshape(len(pictures), side, side, 3)
    visualize.grid(rows, out / "tokens.png")


def check_export(out: Path, images: dict):
    """The exported encoder, loaded again, has the checkpoint's features."""
    pictures = images["test"][0][:64]
    ours = load.load_encoder(out / "runs" / "both").features(pictures, "mean")
    again = load.load_encoder(out / "timm").features(pictures, "mean")
    say(f"export: features differ by at most {float(jnp.abs(ours - again).max()):.1e}")


def main():
    made = cli.parser(__doc__)
    made.add_argument(
        "--out", type=cli.local_path, default="quickstart_run", help="directory for everything"
    )
    made.add_argument("--images", default="digits", choices=IMAGES, help="which images")
    made.add_argument("--steps", type=int, help="steps of each training; default: the configs'")
    args = made.parse_args()
    out, started = args.out.resolve(), time.monotonic()
    outputs.directory(args.out)
    logs, pictures = out / "logs", out / "pictures"
    say(f"everything goes to {out}")
    once(pictures, IMAGES[args.images])
    words = ("tools/import_images.py", pictures, f"--out={out / 'images'}")
    run(logs, Command("import", out / "images" / "dataset_info.json", words))
    images = {split: digits.read_pictures(out / "images", split) for split in ("train", "test")}
    if not (out / "teacher").exists():
        say("training the teacher (supervised: it sees the training labels)")
    train_teacher = partial(digits.train_teacher, out / "images", steps=args.steps or 600)
    once(out / "teacher", train_teacher)
    run(logs, token_store(out, "tokens"))
    held_out = ("--config.split=test", "--config.views=1", f"--config.like={out / 'tokens'}")
    run(logs, token_store(out, "tokens_test", *held_out))
    words = ("tools/verify_tokens.py", out / "tokens", f"--weights={out / 'teacher'}")
    run(logs, Command("verify", out / "tokens", words))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (None,)
    trained = run(logs, *(pretraining(out, name, args.steps) for name in RUNS), cores=cores)
    text = out / "accuracy.md"
    if trained or not text.exists():
        words = ("tools/convert.py", out / "runs" / "both", out / "timm", "--to=timm")
        (logs / "export.txt").unlink(missing_ok=True)
        shutil.rmtree(out / "timm", ignore_errors=True)  # an export is not written over
        run(logs, Command("export", out / "timm", words))
        check_export(out, images)
        pictures_of_runs(out, images)
        say("measuring")
        table = measure(feature_sets(out, images))
        plot.accuracies(table, out / "accuracy.png")
        text.write_text(plot.table(table) + "\n")
    shown = f"Accuracy on {len(images['test'][1])} held-out {args.images}, %, by labels a class:"
    print(f"\n{shown}\n\n{text.read_text()}")
    say(f"done in {progress.duration(time.monotonic() - started)}: tables and pictures in {out}")
    print(f"next: look at {out}/accuracy.png, losses.png, tokens.png; load {out}/timm in timm")


if __name__ == "__main__":
    cli.run(main)
