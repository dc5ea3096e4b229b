"""Evaluations separate a pretrained from an untrained encoder on both small image sets."""

import json
import sys
from pathlib import Path

import pytest

from dgpt_jax import cli, evaluate
from dgpt_jax.commands import jobs, quickstart
from dgpt_jax.storage import tfds_dataset
from tests.support.paths import ROOT

# Labels per class of each protocol; few, so that good features matter.
SHOTS = {"knn": 5, "linear": 5, "fewshot": 5}
# Arguments of configs/quickstart_finetune.py; all labels are used.
HEADS = ("none", "linear", "dinov2", "attentive")
# After 300 steps kNN on glyphs is still below the untrained encoder's, and the attentive probe on
# digits has 86.1 % against 80.0: intervals of 360 images overlap.
STEPS = {"digits": 600, "glyphs": 1200}


def accuracies(out: Path, name: str, monkeypatch, *words) -> dict[str, dict]:
    """{protocol: row of mean features} of the run, by the commands of the README."""
    for protocol, shots in SHOTS.items():
        command = [
            f"--config={ROOT}/configs/{protocol}_in1k.py", f"--config.data={out / 'images'}",
            "--config.train=train", "--config.test=test", "--config.resize=32",
            f"--checkpoint={out / 'runs/both'}", f"--config.shots={shots}", "--config.seeds=0",
            "--config.features=mean", "--config.k=20", f"--out={out / name}.json",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["evaluate", *command, *words])
        cli.run(evaluate.main)
    rows = json.loads((out / f"{name}.json").read_text())["results"]
    return {row["protocol"]: row for row in rows}


def trained_heads(out: Path, name: str, weights: Path) -> dict[str, dict]:
    """{protocol: row after the last step} of fine-tuning and probes."""
    images, results = out / "images", {}
    classes = tfds_dataset.Split(images, "train").label.num_classes
    for head in HEADS:
        workdir = out / name / head
        words = (
            "-m", "dgpt_jax.train", f"--config={ROOT}/configs/quickstart_finetune.py:{head}",
            f"--workdir={workdir}", f"--config.init.weights={weights}",
            f"--config.data.path={images}", f"--config.evals.heldout={images}",
            f"--config.classify.num_classes={classes}",
        )  # fmt: skip
        job = jobs.Job(f"{name}_{head}", head, workdir / "checkpoints", words)
        jobs.run([job], out / "logs", groups=[[]])
        rows = json.loads(next(workdir.glob("results*.json")).read_text())["results"]
        results[rows[0]["protocol"]] = rows[0]
    return results


@pytest.fixture(scope="module", params=STEPS)
def pretrained(request, tmp_path_factory):
    """(image set, directory) with an encoder pretrained for STEPS."""
    images, out = request.param, tmp_path_factory.mktemp(request.param)
    steps = STEPS[images]
    commands = [
        quickstart.write_images(out, images),
        quickstart.import_images(out),
        quickstart.train_teacher(out, images, steps),
        quickstart.token_store(out, images),
        quickstart.heldout_store(out, images),
        quickstart.pretraining(out, images, "both", steps),
    ]
    jobs.run(commands, out / "logs", groups=[[]])
    return images, out


def refuse_overlap(images: str, trained: dict, untrained: dict):
    """Fails if confidence intervals overlap."""
    for protocol, row in trained.items():
        print(f"{images} {protocol}: {row['accuracy']:.1f}, {untrained[protocol]['accuracy']:.1f}")
    for protocol, row in trained.items():
        assert row["low"] > untrained[protocol]["high"], protocol


@pytest.mark.slow
def test_frozen_features(pretrained, monkeypatch):
    images, out = pretrained
    trained = accuracies(out, "trained", monkeypatch)
    untrained = accuracies(out, "untrained", monkeypatch, "--untrained=0")
    assert trained.keys() == untrained.keys() == SHOTS.keys()
    refuse_overlap(images, trained, untrained)


@pytest.mark.slow
def test_fine_tuning_and_probes(pretrained):
    images, out = pretrained
    # The initial weights of the same encoder: one step with learning rate 0.
    initial = quickstart.pretraining(out, images, "both", 1)
    workdir = out / "runs/initial"
    words = (*initial.words, f"--workdir={workdir}", "--config.optim.blr=0")
    jobs.run(
        [jobs.Job("initial", "initial weights", workdir / "checkpoints", words)],
        out / "logs", groups=[[]],
    )  # fmt: skip
    trained = trained_heads(out, "trained_heads", out / "runs/both")
    untrained = trained_heads(out, "untrained_heads", out / "runs/initial")
    assert len(trained) == len(HEADS)
    refuse_overlap(images, trained, untrained)
