"""One line where a package, a device or examples are missing: what it is and what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dgpt_jax import cli, run_diff, run_log
from dgpt_jax.evals import probe
from dgpt_jax.schema import UserError

ROOT = Path(__file__).parent.parent
# {tool: what it cannot do without}
PACKAGES = {
    "plot": "matplotlib",
    "visualize": "matplotlib",
    "report_run": "matplotlib",
    "ablate": "matplotlib",
    "glyphs": "matplotlib",
    "quickstart": "sklearn",
    "digits": "sklearn",
    "small_images": "sklearn",
    "bench_torch": "torch",
}
WITHOUT = """
import sys, importlib
for name in {packages!r}:
    sys.modules[name] = None  # importing it raises ImportError
sys.path.insert(0, "tools")
for tool in {tools!r}:
    try:
        importlib.import_module(tool)
    except SystemExit as e:
        print(tool, "|", e.code)
    else:
        print(tool, "| imported")
"""


def test_a_missing_package_is_one_line_with_the_extra():
    script = WITHOUT.format(packages=sorted(set(PACKAGES.values())), tools=sorted(PACKAGES))
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    lines = dict(line.split(" | ") for line in ended.stdout.splitlines())
    assert lines.keys() == PACKAGES.keys(), ended.stderr
    for tool, line in lines.items():
        assert line.startswith("error: ") and " is not installed: pip install 'dgpt_jax[" in line
        assert "\n" not in line, tool


def test_every_optional_import_is_covered():
    """No tool imports an optional package outside cli.needs."""
    for path in ROOT.glob("tools/*.py"):
        if path.stem == "bench_input_tf":  # runs in an environment of its own, without ours
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if line[:1] != " " and words[:1] in (["import"], ["from"]):
                optional = ("matplotlib", "sklearn", "torch", "timm", "transformers", "wandb")
                assert words[1].partition(".")[0] not in optional, f"{path.name}: {line}"


def test_needs_names_what_is_missing():
    with pytest.raises(SystemExit) as caught, cli.needs("x[y]"):
        import nowhere  # noqa: F401
    assert caught.value.code == "error: nowhere is not installed: pip install 'x[y]'"


@pytest.mark.parametrize("words", [["tools/doctor.py"], ["tools/bench.py", "--steps=1"]])
def test_jax_platforms_is_named(words):
    env = os.environ | {"JAX_PLATFORMS": "nosuch"}
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 1
    text = ended.stdout + ended.stderr
    assert "among JAX_PLATFORMS=nosuch: unset that environment variable" in text, text
    assert "Traceback" not in text


def test_too_few_examples_name_the_flag():
    labels = np.array([0, 0, 0, 1, 2, 2])
    with pytest.raises(UserError) as caught:
        probe.few_labels(labels, 2, seed=0)
    assert str(caught.value).startswith("config.shots=2: 1 of 3 classes have fewer labelled")
    assert "class 1 is the first: set config.shots to 1 or less" in str(caught.value)


def log(directory, lines):
    directory.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / run_log.FILE).write_text(text)
    return run_log.read(directory)


def test_runs_without_common_steps(tmp_path):
    a = log(tmp_path / "a", [{"step": s, "loss": 1.0 / s} for s in (10, 20)])
    b = log(tmp_path / "b", [{"step": s, "loss": 1.0 / s, "x": 1.0} for s in (5, 25)])
    loss, only = run_diff.compare(a, b, ["loss", "x"])
    assert loss.line() == (
        "loss: no common steps; the first run ends with 0.05 at step 20 (2 steps), the second run "
        "ends with 0.04 at step 25 (2 steps), by 0.01"
    )
    assert only.line() == (
        "x: no common steps; the first run has none, the second run ends with 1 at step 25 "
        "(2 steps)"
    )
    assert not loss.same and not only.same
