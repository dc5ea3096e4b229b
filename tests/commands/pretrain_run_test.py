"""`dgpt pretrain` from photographs to an encoder in timm, killed on the way."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import dgpt_jax
from dgpt_jax.errors import UserError
from tests.docs.pages import blocks
from tests.support import data, photographs
from tests.support.paths import ROOT

STAGES = ["import", "tokens", "tokens_heldout", "verify", "train", "export", "knn", "report"]


def start(root: Path) -> subprocess.Popen:
    words = [
        "-m", "dgpt_jax", "pretrain", root / "photos", f"--teacher={root / 'clip'}",
        f"--out={root / 'out'}", "--size=Ti/8", "--epochs=4", "--views=2",
    ]  # fmt: skip
    with (root / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


def inputs(root: Path):
    photographs.write(root / "photos", 300, classes=True)
    (root / "clip").mkdir()
    data.random_teacher(
        root / "clip", tower=dataclasses.replace(data.TOWER, image_size=32, patch=8)
    )


def wait_for_step(root: Path, process: subprocess.Popen, least: int):
    """Waits until the training has logged a step."""
    log = root / "out/logs/train.running.txt"
    while True:
        text = log.read_text() if log.exists() else ""
        if any(int(step) >= least for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)):
            return
        assert process.poll() is None, (root / "log.txt").read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_photographs_become_an_encoder_in_timm(tmp_path):
    """Killed in a random stage, its commands with it, and in the training, they alone left."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    inputs(tmp_path)
    killed = start(tmp_path)
    time.sleep(np.random.default_rng().uniform(8, 40))
    for process in (
        psutil.Process(killed.pid),
        *psutil.Process(killed.pid).children(recursive=True),
    ):
        process.kill()
    killed.wait()
    killed = start(tmp_path)
    wait_for_step(tmp_path, killed, least=3)
    killed.kill()  # SIGTERM reaches the training, which saves
    killed.wait()
    log = tmp_path / "log.txt"
    assert start(tmp_path).wait(timeout=600) == 0, log.read_text()
    out = tmp_path / "out"
    assert {path.stem for path in (out / "logs").iterdir()} == set(STAGES)
    steps = [json.loads(line).get("step") for line in (out / "run/metrics.jsonl").open()]
    assert max(filter(None, steps)) == 16
    assert "resum" in (out / "logs/train.txt").read_text()
    text = (out / "run/metrics.jsonl").read_text()
    assert "rank/cls" in text and "agreement/mean" in text
    assert "heldout/next" in (out / "report/index.html").read_text()
    assert "kNN, 20" in log.read_text()

    encoder = dgpt_jax.load_encoder(out / "run")
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    model = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True).eval()
    mean, std = (np.asarray(model.pretrained_cfg[name]) for name in ("mean", "std"))
    inputs_ = torch.from_numpy((images / 255 - mean) / std).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        theirs = model(inputs_).numpy()
    np.testing.assert_allclose(np.asarray(encoder.features(images, "mean")), theirs, atol=1e-4)
    run_snippet(out, tmp_path / "photos")

    log.write_text("")
    assert start(tmp_path).wait() == 0 and "nothing to do" in log.read_text()
    with pytest.raises(UserError, match="--epochs=4"):
        dgpt_jax.pretrain(tmp_path / "photos", tmp_path / "clip", out, size="Ti/8", views=2)


def run_snippet(out: Path, photos: Path):
    """Runs the lines of docs/tutorials/own_images.md that load an encoder."""
    page = (ROOT / "docs/tutorials/own_images.md").read_text()
    code = next(code for _, code in blocks(page) if code.startswith("import timm"))
    photo = next(photos.rglob("*.jpg"))
    assert Image.open(photo).size[0] >= 96
    code = code.replace("PRETRAINED/timm", str(out / "timm")).replace("photo.jpg", str(photo))
    variables: dict = {}
    exec(compile(code, "own_images.md", "exec"), variables)
    assert tuple(variables["features"].shape) == (1, 192)
