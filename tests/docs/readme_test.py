"""The commands of README and documentation run."""

import dataclasses
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.distributed import preemption
from tests.support import commands as command_files
from tests.support import data
from tests.support.paths import GOLDEN, ROOT, documentation

DOCS = "\n\n".join(page.read_text() for page in documentation())
STARTS = ("python ", "tools/", "git ", "gcloud ", "pip ", "POD=", "EXTRAS=", "import ")
# Commands not run here: the file that runs them, and a text in it.
RUN_ELSEWHERE = {
    "tools/quickstart.sh": (".ci/run", "tools/quickstart.sh"),
    "tools/test.sh": (".ci/run", "tools/test.sh"),
    "tools/setup_venv.sh": ("tools/test.sh", "tools/setup_venv.sh"),
    "git clone": (".ci/run", ""),  # the working tree is a clone
    "python -m tools.benchmarks.bench": (
        "tests/benchmarks/bench_test.py",
        "bench_peer.alternate(",
    ),  # compiles for minutes
    "python tools/plan.py": ("tests/planning/plan_test.py", "tools/plan.py"),
    "python -m tools.studies.ablate": (
        "tests/studies/ablate_test.py",
        "tools/studies/ablate.py",
    ),  # trains for an hour
    "python -m dgpt_jax.evaluate --config=configs/robustness_in1k.py": (
        "tests/support/imagenet_sets.py",
        "robustness.evaluate(",
    ),
    "import torch": ("tests/commands/checkpoint_test.py", "def test_the_onnx_recipe"),
}
# Flags added to commands; later flags override earlier ones.
ADDED = {
    "python -m tools.benchmarks.bench_input": "--examples=32 --seconds=0.1",
    "python -m tools.benchmarks.bench_tokens": "--teacher=B/16 --examples=8 --seconds=0.1",
    "python tools/convert.py D-iGPT_B_PT_1K.pth": "--heads=3 --decoder_heads=2",
    "python -m dgpt_jax.train --config=configs/quickstart_finetune.py:attentive": (
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
PLACEHOLDERS = "SRC IMAGES CLIP_DIR TOKENS RUN OTHER_RUN EXPORT EXPORT_HF PHOTOS TUNED DIR MEAN EMA"


@dataclass(frozen=True)
class Command:
    """An indented command or Python block, and its section."""

    section: str
    text: str
    needs: bool  # the section has a line "Needs …", such as a TPU

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def elsewhere(self) -> tuple[str, str] | None:
        files = [file for start, file in RUN_ELSEWHERE.items() if self.text.startswith(start)]
        return files[0] if files else None


def commands(text: str = DOCS) -> list[Command]:
    result = []
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        title, _, body = section.partition("\n")
        needs = re.search(r"^Needs ", body, re.MULTILINE) is not None
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", body, re.MULTILINE):
            lines = iter(re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n").splitlines())
            for line in lines:
                if line.startswith("import "):
                    line = "\n".join([line, *lines])
                elif not line.startswith(STARTS):
                    continue
                else:
                    line = _join_continued(line, lines)
                result.append(Command(title.lstrip("# "), line, needs))
    return result


def _join_continued(line: str, lines) -> str:
    """Joins a line with those that continue it after a backslash or within quotes."""
    while True:
        if line.endswith("\\"):
            line = f"{line[:-1]} {next(lines).strip()}"
            continue
        try:
            shlex.split(line, comments=True)
        except ValueError:
            line = f"{line} {next(lines).strip()}"
        else:
            return line


def test_every_command_is_run_or_needs_hardware():
    all_commands = commands()
    assert len(all_commands) > 50
    assert sum(map(_is_run, all_commands)) > 25
    for command in all_commands:
        if not _is_run(command) and not command.needs:
            elsewhere = command.elsewhere()
            assert elsewhere, f"neither run by a test nor marked by 'Needs …': {command.text}"
            file, text = elsewhere
            assert text in (ROOT / file).read_text(), command.text


def test_a_command_without_a_test_is_detected():
    text = (
        "## New\n\n    python tools/unheard_of.py\n    rm -rf /\n\n    tools/y.sh a \\\n      b\n"
    )
    first, second = commands(text)
    assert _is_run(first) and not _is_run(second)
    assert not second.needs and second.elsewhere() is None
    assert second.words == ["tools/y.sh", "a", "b"]
    assert all(command.needs for command in commands(text + "\nNeeds a TPU.\n"))


def _is_run(command: Command) -> bool:
    """True if test_the_commands runs it."""
    ours = command.text.startswith(("python tools/", "python -m ", "import dgpt_jax"))
    return ours and not command.needs and command.elsewhere() is None


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch):
    """Runs all commands that need no hardware, in order, each on outputs of earlier ones; those
    with --config run with --smoke."""
    monkeypatch.setattr(preemption, "raise_on_sigterm", lambda: None)
    monkeypatch.chdir(tmp_path)
    paths = {}
    for command in filter(_is_run, commands()):
        if command.section in ("Your own images", "Step by step"):
            paths = _start_section(tmp_path / command.section.split()[0], paths)
        _prepare(paths, command)
        print(f"{command.section}: {command.text}")
        if command.text.startswith("import"):
            _run_python(command.text, paths)
        else:
            _run(monkeypatch, command, paths)
    for name in ("tokens.png", "attention.png", "neighbours.png", "predictions.png", "curves.png"):
        assert Image.open(tmp_path / name).size[0] > 200
    assert "data:image" in (tmp_path / "run.html").read_text()


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
    if "convert.py" in command.text:  # which never overwrites
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
    words = [re.sub(r"(?<=--config=)configs", str(ROOT / "configs"), word) for word in words]
    words = [_substitute(word, paths) for word in words]
    if any(word.startswith("--config=") for word in words):
        words.append("--smoke")
    script = words.pop(0)
    module = words.pop(0).rpartition(".")[2] if script == "-m" else Path(script).stem
    main = command_files.module_of(module).main
    monkeypatch.setattr(sys, "argv", [script, *words])
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
