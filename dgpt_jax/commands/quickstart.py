"""Full pipeline on small images: images → tokens → pretraining → probes → timm, and one page.

The images are colored digits on photographs, made from scikit-learn's data.
A small teacher is trained on them, its tokens are stored, and four tiny encoders are pretrained:
D-iGPT with both losses, with `next` only, with `visible` only, and iGPT's pixel target. Their
frozen features are measured by kNN and logistic regression on held-out images, beside those of raw
pixels, an untrained encoder and the teacher; one encoder is exported to timm. OUT/index.html shows
it all. The teacher sees the training labels; neither it nor any encoder sees the test split.

--images=digits: plain digits; --images=glyphs: characters in many fonts, with a test split of
held-out fonts. The same command resumes after Ctrl-C or a kill.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dgpt_jax import cli
from dgpt_jax.commands import jobs, quickstart_page
from dgpt_jax.commands.jobs import Job
from dgpt_jax.distributed import preemption
from dgpt_jax.errors import UserError
from dgpt_jax.examples import image_sets, measure
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import atomic, output_paths

RUNS = quickstart_page.RUNS
REFERENCES = ("raw", "untrained", "teacher")  # rows that are not trained by the quickstart's config
STEPS = 600  # of the config
SETTINGS, SECONDS = "settings.json", "seconds.json"


def write_images(out: Path, images: str) -> Job:
    """Image files OUT/pictures/{train,test}/CLASS/…"""
    words = ("-m", "dgpt_jax.examples.image_sets", f"{out / 'pictures'}", f"--images={images}")
    return Job("images", f"{images} as image files", out / "pictures", words)


def import_images(out: Path) -> Job:
    """Import of the image files OUT/pictures."""
    images = out / "images"
    words = ("-m", "dgpt_jax", "import", f"{out / 'pictures'}", f"--out={images}")
    about = "the image files become a dataset"
    return Job("import", about, images / "dataset_info.json", words, ("images",))


def train_teacher(out: Path, images: str, steps: int | None) -> Job:
    """Training of OUT/teacher on the labels of the training images; `steps` of the encoders change
    its own in proportion."""
    words = ["-m", "dgpt_jax.examples.small_teacher", f"{out / 'images'}", f"{out / 'teacher'}"]
    words.append(f"--images={images}")
    if steps:
        words.append(f"--steps={max(1, image_sets.SETS[images].teacher.steps * steps // STEPS)}")
    about = "a small teacher learns the training labels"
    return Job("teacher", about, out / "teacher", tuple(words), ("import",))


def token_store(out: Path, images: str, name: str = "tokens", *overrides: str) -> Job:
    """Token store built with configs/quickstart_tokens.py; without a name, that of `train`."""
    image_set = image_sets.SETS[images]
    words = (
        "-m", "dgpt_jax", "tokens", "--config=quickstart_tokens",
        f"--out={out / name}", f"--config.source={out / 'images'}",
        f"--config.teacher.weights={out / 'teacher'}", f"--config.views={image_set.views}",
        f"--config.crop_scale={image_set.crop_scale}",
    )  # fmt: skip
    about = "the teacher's tokens of stored views"
    after = ("teacher", "tokens") if name != "tokens" else ("teacher",)
    return Job(name, about, out / name / "dataset_info.json", words + overrides, after)


def heldout_store(out: Path, images: str) -> Job:
    """Token store of one view of the test images."""
    overrides = ("--config.split=test", "--config.views=1", f"--config.codec_from={out / 'tokens'}")
    return token_store(out, images, "tokens_test", *overrides)


def pretraining(out: Path, images: str, name: str, steps: int | None) -> Job:
    """Training with configs/quickstart.py:NAME."""
    pixels = name == "pixels"
    data, heldout = ("images", "images") if pixels else ("tokens", "tokens_test")
    words = [
        "-m", "dgpt_jax", "train", f"--config=quickstart:{name}",
        f"--workdir={out / 'runs' / name}", f"--config.data.path={out / data}",
        f"--config.evals.heldout={out / heldout}",
        f"--config.data.crop_scale={image_sets.SETS[images].crop_scale}",
    ]  # fmt: skip
    if steps:
        words.append(f"--config.total={steps} steps")
    output = out / "runs" / name / "checkpoints"
    after = ("import",) if pixels else ("verify", "tokens_test")
    return Job(f"train_{name}", f"pretraining, {measure.ROWS[name]}", output, tuple(words), after)


def measurement(out: Path, images: str, name: str, *encoders: str) -> Job:
    """Accuracies of encoders of measure.ROWS."""
    words = ("-m", "dgpt_jax.examples.measure", f"{out}", *encoders, f"--images={images}")
    about = f"kNN and linear probes of {', '.join(measure.ROWS[x] for x in encoders)}"
    trained = (f"train_{x}" for x in ("pixels", *encoders) if x in RUNS)
    after = ("teacher", *trained) if "teacher" in encoders else tuple(trained)
    output = out / "accuracy" / f"{encoders[-1]}.json"
    return Job(f"measure_{name}", about, output, words, after)


def all_jobs(out: Path, images: str, steps: int | None) -> Iterator[Job]:
    """The commands of the quickstart, those that others wait for first."""
    yield write_images(out, images)
    yield import_images(out)
    yield train_teacher(out, images, steps)
    yield token_store(out, images)
    yield heldout_store(out, images)
    verify = ("-m", "dgpt_jax", "verify", f"{out / 'tokens'}")
    verify = (*verify, f"--weights={out / 'teacher'}")
    yield Job("verify", "stored tokens are computed again", out / "tokens", verify, ("tokens",))
    yield pretraining(out, images, "pixels", steps)
    for name in ("both", "visible", "next"):
        yield pretraining(out, images, name, steps)
    yield measurement(out, images, "references", *REFERENCES)
    for name in RUNS:
        yield measurement(out, images, name, name)
    both, timm = out / "runs" / "both", out / "timm"
    export = ("-m", "dgpt_jax", "convert", f"{both}", f"{timm}", "--to=timm")
    yield Job("export", "the encoder for timm", timm, export, ("train_both",), replace=True)


def check_settings(out: Path, settings: dict):
    """Saves the settings of a new directory. Raises UserError if it was made with others."""
    path = out / SETTINGS
    if not path.exists():
        if (out / "pictures").exists():
            raise UserError(f"{out} is of an earlier version: choose another --out, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps(settings) + "\n")
    saved = atomic.read_json(path, "settings of the quickstart")
    for name, value in settings.items():
        if saved.get(name) != value:
            raise UserError(
                f"{out} was made with --{name}={saved.get(name)}, not {value}: choose another --out"
            )


def add_seconds(out: Path, started: float) -> float:
    """Adds the time since `started` to that of earlier commands in OUT. Returns the sum."""
    path = out / SECONDS
    saved = atomic.read_json(path, "times")["seconds"] if path.exists() else 0.0
    seconds = saved + time.monotonic() - started
    atomic.write_text(path, json.dumps({"seconds": seconds}) + "\n")
    return seconds


def work(args: argparse.Namespace, out: Path, todo: list[Job], commands: list[Job]):
    """Runs the commands that are left, and writes the page."""
    display, started = jobs.Display(), time.monotonic()
    display.say(f"output directory: {args.out}")
    try:
        jobs.run(todo, out / "logs")
        quickstart_page.write(out, args.images, commands, display.say)
    finally:
        seconds = add_seconds(out, started)
    display.say(f"done in {progress.duration(seconds)}")


def main():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--out", type=cli.local_path, default="quickstart_run", help="output directory"
    )
    parser.add_argument(
        "--images", default="scenes", choices=image_sets.SETS, help="image set; default: scenes"
    )
    parser.add_argument("--steps", type=int, help="steps of each pretraining; default: 600")
    args = parser.parse_args()
    with cli.needs("quickstart"):  # by the commands that it runs, after minutes
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    output_paths.directory(args.out)
    preemption.raise_on_sigterm()
    out = args.out.resolve()
    check_settings(out, {"images": args.images, "steps": args.steps})
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    commands = list(all_jobs(out, args.images, args.steps))
    todo, page = jobs.pending(commands, out / "logs"), out / quickstart_page.FILE
    if todo or not page.exists():
        page.unlink(missing_ok=True)
        work(args, out, todo, commands)
    else:
        print(f"{args.out} is finished; another --out starts anew")
    print(f"\n{quickstart_page.caption(out, args.images)}\n\n{quickstart_page.text_table(out)}\n")
    print(
        f"next: open {args.out / quickstart_page.FILE} in a browser; load {args.out}/timm in timm"
    )


if __name__ == "__main__":
    cli.run(main)
