"""The evaluations tell a pretrained encoder from an untrained one, on both sets of real images."""

import json
import sys
from pathlib import Path

import digits
import pytest
import quickstart

from dgpt_jax import cli, evaluate, records

ROOT = Path(__file__).parent.parent
# Labels a class that each protocol gets; few, so that they are hard to do without features.
SHOTS = {"knn": 5, "linear": 5, "fewshot": 5}
# What configs/quickstart_finetune.py trains, on all labels.
HEADS = ("none", "linear", "dinov2", "attentive")
# After 300 steps kNN on glyphs is still below the untrained encoder's, and the attentive probe on
# digits has 86.1 % against 80.0: intervals of 360 pictures touch.
STEPS = {"digits": 600, "glyphs": 1200}


def accuracies(out: Path, name: str, monkeypatch, *words) -> dict[str, dict]:
    """{protocol: its row of mean features} of the run, by the commands of the README."""
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
    """{protocol: its row after the last step} of fine-tuning and of probes."""
    images, found = out / "images", {}
    classes = records.Split(images, "train").label.num_classes
    for head in HEADS:
        workdir = out / name / head
        words = (
            "-m", "dgpt_jax.train", f"--config=configs/quickstart_finetune.py:{head}",
            f"--workdir={workdir}", f"--config.classify.weights={weights}",
            f"--config.data.path={images}", f"--config.evals.heldout={images}",
            f"--config.classify.num_classes={classes}",
        )  # fmt: skip
        made = workdir / "checkpoints"
        quickstart.run(out / "logs", quickstart.Command(f"{name}_{head}", made, words))
        rows = json.loads(next(workdir.glob("results*.json")).read_text())["results"]
        found[rows[0]["protocol"]] = rows[0]
    return found


@pytest.fixture(scope="module", params=quickstart.IMAGES)
def pretrained(request, tmp_path_factory):
    """(which images, the directory of everything) after some hundred steps of D-iGPT."""
    images, out = request.param, tmp_path_factory.mktemp(request.param)
    steps, logs = STEPS[images], out / "logs"
    quickstart.IMAGES[images](out / "pictures")
    words = ("tools/import_images.py", out / "pictures", f"--out={out / 'images'}")
    quickstart.run(logs, quickstart.Command("import", out / "images/dataset_info.json", words))
    digits.train_teacher(out / "images", out / "teacher", steps)
    quickstart.run(logs, quickstart.token_store(out, "tokens"))
    held_out = ("--config.split=test", "--config.views=1", f"--config.like={out / 'tokens'}")
    quickstart.run(logs, quickstart.token_store(out, "tokens_test", *held_out))
    quickstart.run(logs, quickstart.pretraining(out, "both", steps))
    return images, out


def refuse_overlap(images: str, trained: dict, untrained: dict):
    """Fails where an interval of one touches that of the other."""
    for protocol, row in trained.items():
        print(f"{images} {protocol}: {row['accuracy']:.1f}, {untrained[protocol]['accuracy']:.1f}")
    for protocol, row in trained.items():
        assert row["low"] > untrained[protocol]["high"], protocol


@pytest.mark.slow
def test_a_pretrained_encoder_is_told_from_an_untrained_one(pretrained, monkeypatch):
    images, out = pretrained
    trained = accuracies(out, "trained", monkeypatch)
    untrained = accuracies(out, "untrained", monkeypatch, "--untrained=0")
    assert trained.keys() == untrained.keys() == SHOTS.keys()
    refuse_overlap(images, trained, untrained)


@pytest.mark.slow
def test_fine_tuning_and_probes_tell_them_apart(pretrained):
    images, out = pretrained
    # The same encoder as it begins: a step whose learning rate is 0.
    begun = quickstart.pretraining(out, "begun", 1)
    words = [word.replace("quickstart.py:begun", "quickstart.py:both") for word in begun.words]
    words.append("--config.optim.blr=0")
    quickstart.run(out / "logs", quickstart.Command("begun", begun.makes, tuple(words)))
    trained = trained_heads(out, "trained_heads", out / "runs/both")
    untrained = trained_heads(out, "untrained_heads", out / "runs/begun")
    assert len(trained) == len(HEADS)
    refuse_overlap(images, trained, untrained)
