"""One-line errors with a remedy for missing packages, devices or examples."""

import ast
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from dgpt_jax import cli, invocation
from dgpt_jax.errors import UserError, counted
from dgpt_jax.evals import probe
from dgpt_jax.monitoring import metrics_log, run_diff
from tests.support import commands
from tests.support.paths import ROOT

PACKAGES = {
    "plot": "matplotlib",
    "visualize": "matplotlib",
    "report": "matplotlib",
    "ablate": "matplotlib",
    "bench_torch": "torch",
}
WITHOUT = """
import sys, importlib, scipy.stats  # which fails if imported twice
for name in {packages!r}:
    sys.modules[name] = None  # importing it raises ImportError
for tool, module in {tools!r}.items():
    try:
        importlib.import_module(module)
    except SystemExit as e:
        print(tool, "|", e.code)
    else:
        print(tool, "| imported")
"""


def test_missing_packages():
    folders = [ROOT / folder for folder in commands.FOLDERS]
    files = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    modules = {name: commands.dotted(files[name]) for name in sorted(PACKAGES)}
    script = WITHOUT.format(packages=sorted(set(PACKAGES.values())), tools=modules)
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    lines = dict(line.split(" | ") for line in process.stdout.splitlines())
    assert lines.keys() == PACKAGES.keys(), process.stderr
    for tool, line in lines.items():
        assert re.match(r"error: .* is not installed: tools/setup_venv.sh \w+$", line), tool


@pytest.mark.parametrize("words,code", [(["--help"], 0), (["--out=never"], 1)])
def test_the_quickstart_without_its_packages(words, code, tmp_path):
    """Only --help works without them; nothing is started."""
    script = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from dgpt_jax import cli; from dgpt_jax.commands import quickstart\n"
        "cli.run(quickstart.main)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    remedy = f"sklearn is not installed: {invocation.installation('quickstart')}\n"
    assert process.stderr == (f"error: {remedy}" if code else "")
    assert not list(tmp_path.iterdir())


def test_optional_imports_are_guarded():
    """No command imports an optional package outside cli.needs."""
    for path in commands.FILES.values():
        if path.stem == "bench_input_tf":  # runs in another environment
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if line[:1] != " " and words[:1] in (["import"], ["from"]):
                optional = ("matplotlib", "sklearn", "torch", "timm", "transformers", "wandb")
                assert words[1].partition(".")[0] not in optional, f"{path.name}: {line}"


def test_needs_names_the_missing_package():
    with pytest.raises(SystemExit) as caught, cli.needs("y"):
        import nowhere  # noqa: F401
    assert caught.value.code == f"error: nowhere is not installed: {invocation.installation('y')}"


@pytest.mark.parametrize(
    "words", [["tools/doctor.py"], ["-m", "tools.benchmarks.bench", "--steps=1"]]
)
def test_invalid_jax_platforms(words):
    env = os.environ | {"JAX_PLATFORMS": "nosuch"}
    process = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert process.returncode == 1
    text = process.stdout + process.stderr
    assert "JAX_PLATFORMS=nosuch" in text, text
    assert "Traceback" not in text


def test_counts_agree_with_their_nouns():
    words = ("step",), ("process", "processes"), ("damaged one",)
    shown = [counted(number, *noun) for noun in words for number in (0, 1, 2)]
    assert shown == [
        "0 steps", "1 step", "2 steps", "0 processes", "1 process", "2 processes",
        "0 damaged ones", "1 damaged one", "2 damaged ones",
    ]  # fmt: skip
    for path in (ROOT / "dgpt_jax").rglob("*.py"):  # no "view(s)"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"\w\((s|es)\)", node.value), f"{path.name}: {node.value}"


def test_too_few_examples():
    labels = np.array([0, 0, 0, 1, 2, 2])
    with pytest.raises(UserError) as caught:
        probe.few_labels(labels, 2, seed=0)
    message = str(caught.value)
    assert message.startswith("config.shots=2: 1 of 3 classes") and "class 1:" in message


def log(directory, lines):
    directory.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / metrics_log.FILE).write_text(text)
    return metrics_log.read(directory)


def test_runs_without_common_steps(tmp_path):
    a = log(tmp_path / "a", [{"step": s, "loss": 1.0 / s} for s in (10, 20)])
    b = log(tmp_path / "b", [{"step": s, "loss": 1.0 / s, "x": 1.0} for s in (5, 25)])
    loss, only = run_diff.compare(a, b, ["loss", "x"])
    assert re.match(r"loss: .*0.05 at step 20 .*0.04 at step 25 .*0.01$", loss.line())
    assert re.match(r"x: .*none.* 1 at step 25 ", only.line())
    assert not loss.same and not only.same
