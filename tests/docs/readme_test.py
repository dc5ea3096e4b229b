"""The commands of README and documentation run."""

import dataclasses
import importlib
import re
import shutil
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli, invocation
from dgpt_jax.distributed import preemption
from tests.docs.pages import Command, all_commands
from tests.support import data
from tests.support.paths import GOLDEN

# Commands not run here, and the test functions that run the same; checked by readme_tables_test.
RUN_ELSEWHERE = {
    "tools/quickstart.sh": ["scripts_test::test_the_quickstart"],
    "dgpt pretrain": ["pretrain_run_test::test_photographs_become_an_encoder_in_timm"],
    "import timm": ["pretrain_run_test::test_photographs_become_an_encoder_in_timm"],
    "tools/test.sh": ["scripts_test::test_the_tests"],
    "tools/setup_venv.sh": ["scripts_test::test_the_environment"],
    "python -m tools.benchmarks.bench ": [  # compiles for minutes
        "bench_test::test_alternating_rounds",
        "bench_test::test_official_losses_and_gradients",
    ],
    "dgpt plan": ["plan_test::test_pods", "plan_test::test_bounds_for_gpus"],
    "python -m tools.studies.ablate": ["ablate_test::test_a_study_of_two_steps"],  # takes an hour
    "python -m tools.studies.continued": ["continued_test::test_a_study_of_two_steps"],
    "dgpt evaluate --config=robustness_in1k": ["robustness_test::test_one_command_on_real_weights"],
    "import torch": ["checkpoint_test::test_the_onnx_recipe"],
}
# Flags added to commands; later flags override earlier ones.
ADDED = {
    "python -m tools.benchmarks.bench_input": "--examples=32 --seconds=0.1",
    "python -m tools.benchmarks.bench_tokens": "--teacher=B/16 --examples=8 --seconds=0.1",
    "dgpt convert D-iGPT_B_PT_1K.pth": "--heads=3 --decoder_heads=2",
    "dgpt train --config=quickstart_finetune:attentive": (
        "--config.classify.num_classes=1000 --config.model.patch=16 --config.model.image_size=224 "
        "--config.evals.heldout_split=validation --config.classify.resize=256"
    ),
}
# Words replaced for a small run.
REPLACED = {
    "--last=3": "--last=2",
    "--last=9": "--last=2",
    "RUN/results_step93835.json": "RUN/smoke_results_step4.json",
    "--config.resize=32": "--config.resize=256",
    "[--untrained=0]": "--untrained=0",
}
PLACEHOLDERS = (
    "SRC IMAGES CLIP_DIR TOKENS RUN OTHER_RUN EXPORT EXPORT_HF PHOTOS TUNED DIR MEAN EMA CONTINUED "
    "LEARNED TOKENS_90 TOKENS_10 RUN_90"
)


def elsewhere(command: Command) -> list[str]:
    """Returns the test functions that run what the command runs."""
    names = [value for start, value in RUN_ELSEWHERE.items() if command.text.startswith(start)]
    return names[0] if names else []


def is_run(command: Command) -> bool:
    """True if a test of this file runs it."""
    ours = command.text.startswith(("dgpt ", "python -m ", "import dgpt_jax"))
    return ours and not command.needs and not elsewhere(command)


def test_every_command_is_run_or_needs_something():
    collected = all_commands()
    assert len(collected) > 50
    assert sum(map(is_run, collected)) > 25
    for command in collected:
        assert is_run(command) or command.needs or elsewhere(command), (
            f"{command.page}, {command.section}: {command.text}: neither run by a test, nor does "
            "the first paragraph of its section or page say what it 'Needs …'"
        )
    for start in RUN_ELSEWHERE:
        assert any(c.text.startswith(start) and not c.needs for c in collected), start


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """From images to an encoder in Python."""
    _run_all([c for c in all_commands() if c.page == "README.md"], tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_commands_of_the_site(tmp_path, monkeypatch):
    _run_all([c for c in all_commands() if c.page != "README.md"], tmp_path, monkeypatch)
    for name in ("attention.png", "neighbors.png", "predictions.png"):
        assert Image.open(tmp_path / name).size[0] > 200
    assert "data:image" in (tmp_path / "run.html").read_text()


def _run_all(selected: list[Command], tmp_path: Path, monkeypatch):
    """Runs those that need no hardware, in order, each on outputs of earlier ones; those with
    --config run with --smoke."""
    monkeypatch.setattr(preemption, "raise_on_sigterm", lambda: None)
    monkeypatch.chdir(tmp_path)
    paths = {}
    for command in filter(is_run, selected):
        if command.section in ("Your own images", "Step by step"):
            paths = _start_section(tmp_path / command.section.split()[0], paths)
        _prepare(paths, command)
        started = time.process_time()
        if command.text.startswith("import"):
            _run_python(command.text, paths)
        else:
            _run(monkeypatch, command, paths)
        print(f"{time.process_time() - started:.1f} s of CPU: {command.section}: {command.text}")
    for name in ("tokens.png", "curves.png"):
        assert Image.open(tmp_path / name).size[0] > 200


def _start_section(root, paths: dict) -> dict:
    """Paths of the placeholders of a section, with images and a teacher."""
    if root.exists():
        return paths
    paths = {name: root / name for name in PLACEHOLDERS.split()}
    own = root.name == "Your"
    splits = ("train", "val") if own else ("train", "validation")
    for seed, split in enumerate(splits):  # later recipes are for ImageNet's 1000
        classes = "ab" if own else [f"{i:03d}" for i in range(1000)]
        per_class = 10 if own else 1
        data.write_folder(paths["SRC"], per_class, classes=classes, split=split, seed=seed)
    data.write_folder(paths["PHOTOS"], 3)
    tower = dataclasses.replace(data.TOWER, image_size=224, patch=56)
    data.random_teacher(paths["CLIP_DIR"], tower=tower)
    return paths


def _prepare(paths: dict, command: Command):
    """Creates inputs of a command that no earlier one writes."""
    if "OTHER_RUN" in command.text and not paths["OTHER_RUN"].exists():
        shutil.copytree(paths["RUN"], paths["OTHER_RUN"])
    if "DIR/runs/both" in command.text and not (paths["DIR"] / "runs").exists():
        shutil.copytree(paths["RUN"], paths["DIR"] / "runs/both")
        shutil.copytree(paths["IMAGES"], paths["DIR"] / "images")
    if "D-iGPT_B_PT_1K.pth" in command.text:
        shutil.copy(GOLDEN / "digpt_tiny.pth", "D-iGPT_B_PT_1K.pth")
        shutil.rmtree(paths["DIR"], ignore_errors=True)
    if command.text.startswith("dgpt convert"):  # which never overwrites
        for name in ("EXPORT_HF", "EXPORT"):
            if name in command.words:
                shutil.rmtree(paths[name], ignore_errors=True)


def _substitute(text: str, paths: dict) -> str:
    for name in sorted(paths, key=len, reverse=True):
        text = re.sub(rf"(?<![\w/]){name}(?!\w)", str(paths[name]), text)
    return text


def _run(monkeypatch, command: Command, paths: dict):
    """Runs a command in this process."""
    words = [REPLACED.get(word, word) for word in command.words[1:]]
    for start, more in ADDED.items():
        words += more.split() if command.text.startswith(f"{start} ") else ()
    if "--keys" in words:
        words = [word.replace("SRC", "EXPORT") for word in words]
    words = [_substitute(word, paths) for word in words]
    if any(word.startswith("--config=") for word in words):
        words.append("--smoke")
    if command.text.startswith("dgpt "):
        main = importlib.import_module(invocation.COMMANDS[words.pop(0)].module).main
    else:  # python -m MODULE
        main = importlib.import_module(words[1]).main
        words = words[2:]
    monkeypatch.setattr(sys, "argv", ["dgpt", *words])
    try:
        cli.run(main)
    except SystemExit as ended:
        assert not ended.code, (command.text, ended.code)


def _run_python(text: str, paths: dict):
    """Runs a block of Python with the variables that the text leaves to the reader."""
    rng = np.random.default_rng(0)
    variables = {
        "pictures": rng.integers(0, 256, (2, 224, 224, 3), np.uint8),
        "images": jnp.zeros((2, 224, 224, 3)),
        "tokens": jnp.asarray(rng.standard_normal((2, 17, 24)), jnp.float32),
        "orders": jnp.asarray([[0, 1, 2, 3], [3, 1, 0, 2]]),
    }
    exec(compile(_substitute(text, paths), "README.md", "exec"), variables)
    assert variables["features"].shape == (2, 32)
    assert set(variables["losses"]) == {"next", "visible"}
