"""Full pipeline on small real images: images → tokens → pretraining → probes → timm.

scikit-learn's 1,797 handwritten digits become image files, a dataset, and a token store of 4 views
from a small CLIP-like teacher trained here. Four tiny encoders are pretrained: D-iGPT with both
losses, with `next` only, with `visible` only, and iGPT's pixel target. Then kNN and linear probes
on held-out digits, an export to timm, and figures. The teacher is supervised and sees the training
labels; neither it nor any encoder sees the test split. --images=glyphs uses characters in many
fonts (glyphs.py) instead, with a test split of held-out fonts.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import cli
from dgpt_jax.commands import plot, visualize
from dgpt_jax.errors import UserError
from dgpt_jax.evals.features import FeatureBank
from dgpt_jax.models import teacher_vit
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import output_paths
from dgpt_jax.weights import api
from dgpt_jax.weights import teacher_loading as teacher_weights
from tools.studies import small_images
from tools.studies.small_images import Images, say

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("both", "next", "visible", "pixels")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that creates `output`; logs/NAME.txt holds its command line and its output."""

    name: str
    output: Path
    words: tuple[Path | str, ...]

    @property
    def line(self) -> str:
        return " ".join(["python", *map(str, self.words)])

    def done(self, logs: Path) -> bool:
        """True if the same command succeeded before and its output still exists."""
        log = logs / f"{self.name}.txt"
        exists = self.output.exists() and log.exists()
        return exists and log.read_text().startswith(f"{self.line}\n")

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


def run(logs: Path, *commands: Command, cores: Sequence[int | None] = (None,)) -> bool:
    """Runs the commands that are not done yet, one per core. Returns True if there were any."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [c for c in commands if not c.done(logs)]
    any_run, running = bool(waiting), {}
    for command in commands:
        if command not in waiting:
            say(f"{command.name}: already done")
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
    finally:  # Ctrl-C reaches the commands too, which save and exit
        for _, process in running.values():
            process.wait()
    return any_run


def pretraining(out: Path, name: str, steps: int | None) -> Command:
    """Training with configs/quickstart.py:NAME."""
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
    """Token store built with configs/quickstart_tokens.py."""
    words = (
        "tools/build_tokens.py", "--config=configs/quickstart_tokens.py", f"--out={out / name}",
        f"--config.source={out / 'images'}", f"--config.teacher.weights={out / 'teacher'}",
    )  # fmt: skip
    return Command(name, out / name / "dataset_info.json", words + overrides)


def feature_sets(out: Path, images: Images) -> dict[str, dict[str, FeatureBank]]:
    """{name: {split: features and labels}} of all encoders and baselines."""
    teacher = teacher_weights.load(str(out / "teacher"))
    trained = {name: api.load_encoder(out / "runs" / name) for name in RUNS}
    students = {
        "untrained encoder": api.untrained(trained["both"].model, seed=0),
        "iGPT (pixels)": trained["pixels"],
        "D-iGPT visible only": trained["visible"],
        "D-iGPT next only": trained["next"],
        "D-iGPT both": trained["both"],
    }
    encoders: dict[str, Any] = {
        "raw pixels": small_images.raw_pixels,
        **{name: partial(student.features, pooling="mean") for name, student in students.items()},
        "the teacher": lambda x: teacher_vit.teacher_tokens(teacher.tower, teacher.params, x)[:, 0],
    }
    return {
        name: small_images.feature_banks(jax.jit(encode), images)
        for name, encode in encoders.items()
    }


def measure(features: Mapping[str, Mapping[str, FeatureBank]]) -> plot.Cells:
    """Accuracy in percent, mean and standard error over subsets of labels, by name."""
    return {
        name: {
            key: (
                float(np.mean(v)),
                float(np.std(v, ddof=1)) / len(v) ** 0.5 if len(v) > 1 else 0.0,
            )
            for key, v in small_images.accuracies(splits).items()
        }
        for name, splits in features.items()
    }


def save_figures(out: Path, images: Images):
    """Writes losses.png (curves) and tokens.png (PCA of the encoders' patch tokens)."""
    runs = [out / "runs" / name for name in RUNS]
    plot.curves(runs, ["next", "visible", "heldout/next", "heldout/visible"], out / "losses.png")
    pixels, labels = images["test"]
    classes = np.unique(labels)
    classes = classes[:: max(1, len(classes) // 10)][:10]
    examples = pixels[[np.flatnonzero(labels == label)[0] for label in classes]]
    rows = {"image": examples}
    encoders = {name: api.load_encoder(out / "runs" / name) for name in ("both", "pixels")}
    encoders = {"untrained": api.untrained(encoders["both"].model, seed=0)} | encoders
    for name, encoder in encoders.items():
        tokens = np.asarray(encoder.tokens(examples))[:, 1:]
        side = encoder.model.grid
        rows[name] = visualize.pca_colors(tokens).reshape(len(examples), side, side, 3)
    visualize.grid(rows, out / "tokens.png")


def check_export(out: Path, images: Images):
    """Prints the largest difference between features of the checkpoint and of the export."""
    pixels = images["test"][0][:64]
    expected = api.load_encoder(out / "runs" / "both").features(pixels, "mean")
    exported = api.load_encoder(out / "timm").features(pixels, "mean")
    say(f"export: features differ by at most {float(jnp.abs(expected - exported).max()):.1e}")


def main():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--out", type=cli.local_path, default="quickstart_run", help="output directory"
    )
    parser.add_argument(
        "--images", default="digits", choices=small_images.WRITERS, help="image set"
    )
    parser.add_argument("--steps", type=int, help="steps per training; default: the config's")
    args = parser.parse_args()
    out, started = args.out.resolve(), time.monotonic()
    output_paths.directory(args.out)
    logs, image_files = out / "logs", out / "pictures"
    say(f"output directory: {out}")
    small_images.create_once(image_files, small_images.WRITERS[args.images])
    words = ("tools/import_images.py", image_files, f"--out={out / 'images'}")
    run(logs, Command("import", out / "images" / "dataset_info.json", words))
    images = small_images.read_splits(out)
    small_images.train_teacher_once(out, args.steps or small_images.TEACHER_STEPS)
    run(logs, token_store(out, "tokens"))
    held_out = ("--config.split=test", "--config.views=1", f"--config.codec_from={out / 'tokens'}")
    run(logs, token_store(out, "tokens_test", *held_out))
    words = ("tools/verify_tokens.py", out / "tokens", f"--weights={out / 'teacher'}")
    run(logs, Command("verify", out / "tokens", words))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (None,)
    trained = run(logs, *(pretraining(out, name, args.steps) for name in RUNS), cores=cores)
    text = out / "accuracy.md"
    if trained or not text.exists():
        words = ("tools/convert.py", out / "runs" / "both", out / "timm", "--to=timm")
        (logs / "export.txt").unlink(missing_ok=True)
        shutil.rmtree(out / "timm", ignore_errors=True)  # exports are never overwritten
        run(logs, Command("export", out / "timm", words))
        check_export(out, images)
        save_figures(out, images)
        say("measuring")
        table = measure(feature_sets(out, images))
        plot.accuracies(table, out / "accuracy.png")
        text.write_text(plot.table(table) + "\n")
    title = f"Accuracy on {len(images['test'][1])} held-out {args.images}, %, by labels per class:"
    print(f"\n{title}\n\n{text.read_text()}")
    say(f"done in {progress.duration(time.monotonic() - started)}: tables and figures in {out}")
    print(f"next: look at {out}/accuracy.png, losses.png, tokens.png; load {out}/timm in timm")


if __name__ == "__main__":
    cli.run(main)
