"""Evaluations separate a pretrained from an untrained encoder on both small image sets."""

import json
import sys
from pathlib import Path

import pytest

from dgpt_jax import cli, evaluate
from dgpt_jax.storage import tfds_dataset
from tests.support.paths import ROOT
from tools.studies import digits, quickstart, small_images

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
            "-m", "dgpt_jax.train", f"--config=configs/quickstart_finetune.py:{head}",
            f"--workdir={workdir}", f"--config.init.weights={weights}",
            f"--config.data.path={images}", f"--config.evals.heldout={images}",
            f"--config.classify.num_classes={classes}",
        )  # fmt: skip
        command = quickstart.Command(f"{name}_{head}", workdir / "checkpoints", words)
        quickstart.run(out / "logs", command)
        rows = json.loads(next(workdir.glob("results*.json")).read_text())["results"]
        results[rows[0]["protocol"]] = rows[0]
    return results


@pytest.fixture(scope="module", params=small_images.WRITERS)
def pretrained(request, tmp_path_factory):
    """(image set, directory) with an encoder pretrained for STEPS."""
    images, out = request.param, tmp_path_factory.mktemp(request.param)
    steps, logs = STEPS[images], out / "logs"
    small_images.WRITERS[images](out / "pictures")
    words = ("tools/import_images.py", out / "pictures", f"--out={out / 'images'}")
    quickstart.run(logs, quickstart.Command("import", out / "images/dataset_info.json", words))
    digits.train_teacher(out / "images", out / "teacher", steps)
    quickstart.run(logs, quickstart.token_store(out, "tokens"))
    held_out = ("--config.split=test", "--config.views=1", f"--config.codec_from={out / 'tokens'}")
    quickstart.run(logs, quickstart.token_store(out, "tokens_test", *held_out))
    quickstart.run(logs, quickstart.pretraining(out, "both", steps))
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
    initial = quickstart.pretraining(out, "initial", 1)
    words = [word.replace("quickstart.py:initial", "quickstart.py:both") for word in initial.words]
    words.append("--config.optim.blr=0")
    quickstart.run(out / "logs", quickstart.Command("initial", initial.output, tuple(words)))
    trained = trained_heads(out, "trained_heads", out / "runs/both")
    untrained = trained_heads(out, "untrained_heads", out / "runs/initial")
    assert len(trained) == len(HEADS)
    refuse_overlap(images, trained, untrained)
