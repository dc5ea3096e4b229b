"""Tests that the scripts and the weekly workflow run, by their own calls of pytest.

Scripts run in a copy of the tree's skeleton, in which stand-ins for Python and other programs
record their arguments; pytest then collects with the recorded arguments.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.support.paths import ROOT

SCRIPTS = ("tools/test.sh", ".ci/run")
WORKFLOW = ".github/workflows/weekly.yml"
PROGRAMS = ("python", "ruff", "lint-imports", "basedpyright", "mkdocs")
STAND_IN = """#!/usr/bin/env bash
{ printf '%s\\x1f' "$0" "$@"; printf '\\x1e'; } >>"$CALLS"
"""


@dataclass(frozen=True)
class Run:
    """A call of pytest on all tests."""

    source: str
    marker: str
    keyword: str

    @property
    def words(self) -> list[str]:
        return [*(["-m", self.marker] if self.marker else ()),
                *(["-k", self.keyword] if self.keyword else ())]  # fmt: skip


class Skeleton:
    """A tree with the scripts, and stand-ins for what they call."""

    def __init__(self, root: Path, scripts: Iterable[str] = SCRIPTS):
        self.root, self._calls = root, root / "calls"
        stand_ins = ["tools/setup_venv.sh", "tools/quickstart.sh", "bin/python3.12"]
        stand_ins += [f"{venv}/bin/{name}" for venv in (".venv", ".venv312") for name in PROGRAMS]
        for name in (*stand_ins, *scripts):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        for name in stand_ins:
            (root / name).write_text(STAND_IN)
            (root / name).chmod(0o755)
        for name in scripts:
            shutil.copy(ROOT / name, root / name)

    def run(self, *words: str, **env: str) -> list[list[str]]:
        """Runs a command in the tree. Returns the calls of stand-ins: program and arguments."""
        self._calls.write_text("")
        path = f"{self.root / 'bin'}:/usr/bin:/bin"
        env = {"PATH": path, "HOME": str(self.root), "CALLS": str(self._calls)} | env
        done = subprocess.run(words, cwd=self.root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        calls = self._calls.read_text().split("\x1e")[:-1]
        return [call.removesuffix("\x1f").split("\x1f") for call in calls]


def pytest_runs(root: Path) -> list[Run]:
    """Returns the runs of SCRIPTS and WORKFLOW, with a skeleton below `root`."""
    skeleton = Skeleton(root)
    commands = [(name, [f"./{name}"]) for name in SCRIPTS]
    commands += [(WORKFLOW, ["bash", "-euc", step]) for step in _steps(ROOT / WORKFLOW)]
    calls = [(source, call) for source, words in commands for call in skeleton.run(*words)]
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", default="")
    parser.add_argument("-k", default="")
    runs = {}  # without those that repeat the words of an earlier one
    for source, (_, *words) in calls:
        if words[:2] == ["-m", "pytest"]:
            options = parser.parse_known_args(words[2:])[0]
            run = Run(source, options.m, options.k)
            runs.setdefault((options.m, options.k), run)
    return list(runs.values())


def _steps(workflow: Path) -> Iterator[str]:
    """Yields the shell commands of all jobs that run tests, for each value of their matrices."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for values in itertools.product(*matrix.values()):
            for step in job["steps"]:
                text = step.get("run", "")
                for key, value in zip(matrix, values, strict=True):
                    text = re.sub(rf"\${{{{ *matrix\.{key} *}}}}", value, text)
                if "pytest" in text or "test.sh" in text:
                    yield text


@dataclass(frozen=True)
class Collected:
    """Names "file_test::test_name" that each run selects; files that are skipped as a whole."""

    functions: list[set[str]]
    skipped_files: set[str]


def collect(runs: Iterable[Run], files: Iterable[Path]) -> Collected:
    """Collects tests of these files in one process, once per run."""
    words = [sys.executable, "-m", "tests.docs.collect", *map(str, files)]
    # The process is no worker of the pytest that started it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True,
        input=json.dumps([run.words for run in runs]),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return Collected([set(names) for names in result["functions"]], set(result["skipped"]))


def files_of(name: str) -> list[Path]:
    """Returns the files that "file_test::test_name" may mean."""
    return sorted((ROOT / "tests").rglob(f"{name.partition('::')[0]}.py"))


def undefined(names: Iterable[str]) -> dict[str, str]:
    """Returns {name: reason} of those that name no single test function."""
    result = {}
    for name in names:
        files, function = files_of(name), name.partition("::")[2]
        if len(files) != 1:
            result[name] = f"{len(files)} files have this name"
        elif not re.search(rf"^def {re.escape(function)}\(", files[0].read_text(), re.MULTILINE):
            result[name] = f"{files[0].relative_to(ROOT)} has no such function"
    return result


def never_run(names: Iterable[str], collected: Collected) -> set[str]:
    """Returns the names that all runs deselect, or that are always skipped."""
    selected = set().union(*collected.functions)
    return {
        name
        for name in names
        if name not in selected and name.partition("::")[0] not in collected.skipped_files
    }
