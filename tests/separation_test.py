"""The evaluations tell a pretrained encoder from an untrained one, on both sets of real images."""

import json
import sys
from pathlib import Path

import digits
import pytest
import quickstart

from dgpt_jax import cli, evaluate

ROOT = Path(__file__).parent.parent
# Labels a class that each protocol gets; few, so that they are hard to do without features.
SHOTS = {"knn": 5, "linear": 5, "fewshot": 5}
# Glyphs take longer: after 300 steps kNN is still below the untrained encoder's.
STEPS = {"digits": 300, "glyphs": 1200}


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


@pytest.mark.slow
@pytest.mark.parametrize("images", quickstart.IMAGES)
def test_a_pretrained_encoder_is_told_from_an_untrained_one(images, tmp_path, monkeypatch):
    """Without overlap of the intervals, by every protocol, after some hundred steps of D-iGPT."""
    steps, logs = STEPS[images], tmp_path / "logs"
    quickstart.IMAGES[images](tmp_path / "pictures")
    words = ("tools/import_images.py", tmp_path / "pictures", f"--out={tmp_path / 'images'}")
    made = tmp_path / "images/dataset_info.json"
    quickstart.run(logs, quickstart.Command("import", made, words))
    digits.train_teacher(tmp_path / "images", tmp_path / "teacher", steps)
    quickstart.run(logs, quickstart.token_store(tmp_path, "tokens"))
    like = f"--config.like={tmp_path / 'tokens'}"
    held_out = ("--config.split=test", "--config.views=1", like)
    quickstart.run(logs, quickstart.token_store(tmp_path, "tokens_test", *held_out))
    quickstart.run(logs, quickstart.pretraining(tmp_path, "both", steps))
    trained = accuracies(tmp_path, "trained", monkeypatch)
    untrained = accuracies(tmp_path, "untrained", monkeypatch, "--untrained=0")
    for protocol in SHOTS:
        assert trained[protocol]["low"] > untrained[protocol]["high"], protocol
