"""Wrong inputs to the real commands: one clear line, exit code 1, no file changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import train
from dgpt_jax.data.ingest import importer
from dgpt_jax.storage import orbax_checkpoint
from tests.support import data
from tests.support.paths import ROOT
from tests.training import loop_test as train_test

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with valid and invalid inputs of all kinds."""
    root = tmp_path_factory.mktemp("wrong")
    dataset = data.image_dataset(root, per_class=6)
    other = data.image_dataset(root / "other", per_class=6, classes=("b", "c"), seed=1)
    unlabeled(root)
    teacher = data.random_teacher(root / "teacher")
    store = data.token_store(root, dataset, teacher)
    data.token_store(root / "other", other, teacher)
    command([*PRETRAIN, "--workdir={root}/run"], root).check_returncode()
    average(root, store)
    damaged_copies(root / "run/checkpoints/4", root)
    command([*TUNE, "--workdir={root}/tuned"], root).check_returncode()
    command([*KNN, "--checkpoint={root}/run", "--out={root}/of-run.json"], root).check_returncode()
    bad_folders(root)
    bad_teachers(root)
    (root / "afile").write_text("not a directory")
    (root / "log").mkdir()
    return root


def unlabeled(root):
    folder = root / "unlabelled-folder"
    folder.mkdir()
    for i, file in enumerate(sorted((root / "folder").glob("*/*.png"))):
        shutil.copy(file, folder / f"{i}.png")
    importer.import_images(folder, root / "unlabelled", say=lambda _: 0)


def average(root, store):
    """A run with a moving average of the weights and without its opt_state."""
    optim = {"warmup": "1 steps", "ema": 0.9}
    assert train.train(train_test.settings(store, total="2 steps", optim=optim), root / "ema") == 0
    shutil.rmtree(root / "ema/checkpoints/2/opt_state")


def damaged_copies(step, root):
    """Work directories with flipped bits in arrays, and with non-finite weights."""
    shutil.copytree(step.parent.parent, root / "flipped")
    for path in (root / "flipped/checkpoints/4/params/ocdbt.process_0/d").iterdir():
        content = bytearray(path.read_bytes())
        for position in range(0, len(content), 512):  # in every array
            content[position] ^= 4
        path.write_bytes(content)
    params, metadata = orbax_checkpoint.load_params(step.parent.parent)
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    orbax_checkpoint.save_params(root / "nan", 4, params, {"config": metadata["config"]})


def bad_folders(root):
    """Folders of images that cannot be imported without a flag, or at all."""
    image = Image.open(next((root / "folder").glob("*/*.png")))
    floats = root / "floats/a"
    floats.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).random((16, 16)).astype("float32")).save(
        floats / "x.tif"
    )
    for name in ("train2017", "val2017"):
        (root / "coco" / name).mkdir(parents=True)
        image.save(root / "coco" / name / "1.png")
    (root / "empty/a").mkdir(parents=True)
    (root / "empty/a/notes.txt").write_text("no image")
    (root / "cut.tar").write_bytes(b"cut" * 100)
    (root / "list.txt").write_text("a/000.png \n")


def bad_teachers(root):
    for name, change in {
        "mean": {"mean": [104.0, 117.0, 123.0]},
        "lfs": None,
        "page": None,
    }.items():
        shutil.copytree(root / "teacher", root / f"teacher-{name}")
        weights = next((root / f"teacher-{name}").glob("*.safetensors"))
        config = root / f"teacher-{name}/open_clip_config.json"
        if change:
            settings = json.loads(config.read_text())
            settings.setdefault("preprocess_cfg", {}).update(change)
            config.write_text(json.dumps(settings))
        elif name == "lfs":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
        else:
            weights.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


MODEL = [f"--config.model.{name}={value}".replace(" ", "") for name, value in data.TINY.items()]
PRETRAIN = ["-m", "dgpt_jax.train", "--config=configs/quickstart.py", "--workdir={root}/new",
            "--config.data.path={root}/tokens", "--config.batch_size=4", *MODEL,
            "--config.total=4 steps", "--config.optim.warmup=1 steps",
            "--config.teacher.width=24", "--config.teacher.grid=4"]  # fmt: skip
TUNE = ["-m", "dgpt_jax.train", "--config=configs/quickstart_finetune.py", "--workdir={root}/new",
        "--config.data.path={root}/images", "--config.batch_size=4", *MODEL,
        "--config.total=2 steps", "--config.optim.warmup=1 steps", "--config.evals.heldout=",
        "--config.classify.num_classes=2", "--config.classify.mixup_group_size=2",
        "--config.init.weights=", "--config.checkpoint.best="]  # fmt: skip
KNN = ["-m", "dgpt_jax.evaluate", "--config=configs/knn_in1k.py", "--config.k=(1,)",
       "--config.data={root}/images", "--config.train=train", "--config.test=train",
       "--config.resize=18", "--config.batch_size=4"]  # fmt: skip
IMPORT = ["tools/import_images.py"]
BUILD = ["tools/build_tokens.py", "--config=configs/quickstart_tokens.py",
         "--config.source={root}/images", "--out={root}/built"]  # fmt: skip
CONVERT = ["tools/convert.py"]
EMBED = ["tools/embed.py", "--checkpoint={root}/run", "--out={root}/new"]

WRONG = {  # kind: (command, text of its error)
    "classes of the held-out set": (
        [*TUNE, "--config.evals.heldout={root}/other/images",
         "--config.evals.heldout_split=train"], "class 0 is 'b'"),
    "no labels to train on": ([*TUNE, "--config.data.path={root}/unlabelled"], "label"),
    "no labels to evaluate": ([*KNN, "--config.data={root}/unlabelled",
                                 "--checkpoint={root}/run"], "label"),
    "non-finite features": ([*KNN, "--checkpoint={root}/nan"], "finite"),
    "a missing average": ([*KNN, "--checkpoint={root}/ema"], "opt_state"),
    "flipped bits": ([*CONVERT, "{root}/flipped", "{root}/new", "--to=timm"], "flipped"),
    "flipped bits, continued": ([*PRETRAIN, "--workdir={root}/flipped"], "flipped"),
    "results of other weights": (
        [*KNN, "--checkpoint={root}/tuned", "--out={root}/of-run.json"], "of-run.json"),
    "another run in the directory": (
        [*PRETRAIN, "--workdir={root}/run", "--config.seed=7"], "seed"),
    "other data under the same path": (
        [*PRETRAIN, "--workdir={root}/run", "--config.data.path={root}/other/tokens"],
        "other/tokens"),
    "floats without a range": ([*IMPORT, "{root}/floats", "--out={root}/new"], "range"),
    "folders that are splits": ([*IMPORT, "{root}/coco", "--out={root}/new"], "train2017"),
    "no images": ([*IMPORT, "{root}/empty", "--out={root}/new"], "no images"),
    "an invalid tar": ([*IMPORT, "{root}/cut.tar", "--out={root}/new"], "tar"),
    "a missing folder": ([*IMPORT, "{root}/nowhere", "--out={root}/new"], "nowhere"),
    "fewer than one step": ([*PRETRAIN, "--config.total=0.1 steps"], "config.total"),
    "warmup until the end": ([*PRETRAIN, "--config.optim.warmup=4 steps"], "warmup"),
    "a number out of range": ([*PRETRAIN, "--config.optim.clip_norm=-1"], "clip_norm"),
    "an unknown home": ([*PRETRAIN, "--workdir=~nobody-at-all/x"], "nobody-at-all"),
    "an unknown metric": ([*PRETRAIN, "--config.checkpoint.best=knn/x"], "best"),
    "an unknown key": ([*PRETRAIN, "--config.optim.lr=1"], "did you mean"),
    "tokens of another width": ([*PRETRAIN, "--config.teacher.width=768"], "width 24"),
    "a work directory that is a file": ([*PRETRAIN, "--workdir={root}/afile"], "afile"),
    "an output below a file": (
        [*CONVERT, "{root}/run", "{root}/afile/x", "--to=timm"], "afile"),
    "an existing output": ([*CONVERT, "{root}/run", "{root}/run", "--to=timm"], "already"),
    "results below a file": ([*KNN, "--checkpoint={root}/run", "--out={root}/afile/x.json"],
                             "afile"),
    "invalid weights": ([*KNN, "--checkpoint={root}/list.txt"], "list.txt"),
    "a mean out of range": ([*BUILD, "--config.teacher.weights={root}/teacher-mean"], "mean"),
    "a git-lfs pointer": ([*BUILD, "--config.teacher.weights={root}/teacher-lfs"], "LFS"),
    "a page instead of weights": ([*BUILD, "--config.teacher.weights={root}/teacher-page"],
                                  "web page"),
    "no teacher": ([*BUILD, "--config.teacher.weights={root}/nowhere"], "nowhere"),
    "a missing log": (["tools/plot.py", "{root}/log", "--out={root}/new.png"],
                                "metrics.jsonl"),
    "robustness without a head": (
        ["-m", "dgpt_jax.evaluate", "--config=configs/robustness_in1k.py",
         "--checkpoint={root}/run", "--config.data={root}/images"], "head"),
    "robustness with other classes": (
        ["-m", "dgpt_jax.evaluate", "--config=configs/robustness_in1k.py",
         "--checkpoint={root}/tuned", "--config.data={root}/images"], "1000"),
    "no images to embed": ([*EMBED, "{root}/empty"], "no images"),
    "a missing folder to embed": ([*EMBED, "{root}/nowhere"], "nowhere"),
    "a missing encoder": ([*EMBED, "{root}/images", "--checkpoint={root}/nowhere"], "nowhere"),
    "invalid weights to embed": (
        [*EMBED, "{root}/images", "--checkpoint={root}/list.txt"], "list.txt"),
    "non-finite features to store": (
        [*EMBED, "{root}/images", "--checkpoint={root}/nan"], "finite"),
    "a split that is missing": ([*EMBED, "{root}/images", "--split=test"], "test"),
    "a format without the dtype": (
        [*EMBED, "{root}/images", "--dtype=bfloat16"], "--dtype=bfloat16"),
    "a directory with other files": (
        [*EMBED, "{root}/images", "--out={root}/folder"], "other files"),
    "an output on gs://": ([*EMBED, "{root}/images", "--out=gs://x/y"], "local disk"),
    "no images to visualize": (
        ["tools/visualize.py", "{root}/run", "{root}/empty", "--out={root}/new.png"], "no images"),
}  # fmt: skip


def command(words, root) -> subprocess.CompletedProcess:
    """Runs a command."""
    return subprocess.run(
        [sys.executable, *(word.format(root=root) for word in words)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def contents(root: Path) -> dict[str, str]:
    """{file: digest} of all below a directory."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*")) if path.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_one_line_and_no_file_changed(root, kind):
    words, expected = WRONG[kind]
    before = contents(root)
    process = command(words, root)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1, process.stderr[-2000:] + process.stdout[-500:]
    assert "Traceback" not in process.stdout + process.stderr
    assert len(errors) == 1 and expected in errors[0], process.stderr[-2000:]
    assert process.stderr.splitlines()[-1] == errors[0]
    assert "\x1b" not in process.stderr
    assert contents(root) == before
