"""Writes one of everything that users keep, as this version writes it, and what it must read as.

    python tests/golden/write_formats.py tests/golden/formats/VERSION

Run it once for a version whose formats differ, and keep the older directories: formats_test.py
opens all of them. Written by the commands themselves, with paths relative to the directory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import data  # noqa: E402
from tests.support.formats import RUNS, summary  # noqa: E402

CONFIG = """
from dgpt_jax.config import {command}, default_config


def get_config():
    config = default({command})
    fields = {fields!r}
    for name, value in fields.items():
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        setattr(section, last, value)
    return config
"""
MODEL = {f"model.{name}": value for name, value in data.TINY.items()}
TRAIN = MODEL | {
    "total": "6 steps", "batch_size": 8, "dtype": "float32", "log_every": 1, "platform": "cpu",
    "data.path": "tokens", "data.threads": 2, "optim.blr": 0.064, "optim.warmup": "2 steps",
    "checkpoint.every": "3 steps", "evals.every": "3 steps", "evals.batch_size": 8,
    "evals.knn": "images", "evals.knn_train": "train[:16]", "evals.knn_test": "train[16:]",
    "evals.knn_resize": 18, "evals.figures": 0,
}  # fmt: skip
TOKENS = {
    "source": "images", "teacher.weights": "teacher", "image_size": 16, "image_encoding": "png",
    "shard_size": 16, "batch_size": 8, "threads": 2, "views": 2,
}  # fmt: skip
CLASSIFY = TRAIN | {
    "task": "classify", "data.path": "images", "evals.knn": "", "evals.heldout": "images",
    "evals.heldout_split": "train", "classify.num_classes": 2, "classify.mixup_group_size": 4,
    "init.weights": "run", "optim.layer_decay": 0.7,
}  # fmt: skip
EMA = {"optim.ema": 0.9, "evals.knn": ""}
BAD = {"optim.blr": 1e12, "optim.max_skipped_in_a_row": 2, "evals.knn": "", "total": "100 steps"}
EVALUATE = {
    "data": "images", "train": "train[:16]", "test": "train[16:]", "k": (3,), "resize": 18,
    "platform": "cpu",
}  # fmt: skip
EXPORTS = {
    "encoder.safetensors": ("--to=safetensors", "--part=encoder"),
    "timm": ("--to=timm",),
    "hf": ("--to=hf",),
    "vit.npz": ("--to=big_vision", "--activation=gelu_tanh"),
    "full.safetensors": ("--to=digpt",),
}


def run(directory: Path, *words, config: str = "", check: bool = True, **fields):
    """Runs `python WORDS` in the directory, with a config of the named class and these fields."""
    words = [sys.executable, *words]
    if config:
        (directory / "config.py").write_text(CONFIG.format(command=config, fields=fields))
        words.append("--config=config.py")
    subprocess.run(words, cwd=directory, check=check)


def write(directory: Path):
    """Everything but expected.json."""
    (directory / "tools").symlink_to(ROOT / "tools")  # commands are written down as they are given
    train = ("-m", "dgpt_jax.train")
    data.write_folder(directory / "folder", 12)
    data.random_teacher(directory / "teacher")
    run(directory, "tools/import_images.py", "folder", "--out=images", "--shard_size=16")
    run(directory, "tools/build_tokens.py", "--out=tokens", config="Tokens", **TOKENS)
    run(directory, *train, "--workdir=run", config="Train", **TRAIN)
    run(directory, *train, "--workdir=ema", config="Train", **TRAIN | EMA)
    run(directory, *train, "--workdir=tuned", config="Train", **CLASSIFY)
    run(directory, *train, "--workdir=bad", config="Train", check=False, **TRAIN | BAD)
    for cache in directory.glob("*/compile_cache"):
        shutil.rmtree(cache)
    for name in RUNS:  # as killed before the last checkpoint
        shutil.rmtree(directory / name / "checkpoints/6")
        shutil.rmtree(directory / name / "tensorboard")
    for name, words in EXPORTS.items():
        run(directory, "tools/convert.py", "run", f"exports/{name}", *words)
    run(directory, "tools/convert.py", "tuned", "exports/tuned", "--to=timm")
    evaluate = ("-m", "dgpt_jax.evaluate", "--checkpoint=run")
    run(directory, *evaluate, config="Evaluate", **EVALUATE)
    for name in ("bad/checkpoints", "bad/tensorboard", "folder", "teacher"):
        shutil.rmtree(directory / name)
    for name in ("config.py", "tools"):
        (directory / name).unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists: formats that were written are kept")
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "formats"
        directory.mkdir()
        write(directory)
        (directory / "expected.json").write_text(json.dumps(summary(directory), indent=1) + "\n")
        shutil.copytree(directory, out)


if __name__ == "__main__":
    main()
