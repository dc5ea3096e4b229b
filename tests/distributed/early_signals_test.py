"""Signals to a command that still imports its modules."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgpt_jax import starting
from tests.processes import ROOT, outputs_of, start

FILES = [
    path
    for folder in ("dgpt_jax", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "\n    cli.run(main)\n" in path.read_text()
]
COMMANDS = {
    path.stem: ["-m", f"dgpt_jax.{path.stem}"] if path.parent.name == "dgpt_jax" else [path]
    for path in FILES
}


def ended_while_importing(command: str, number: int, delay: float) -> tuple[int, str]:
    """(exit code, output) of a command that gets a signal so many seconds after it has begun to
    import what is large."""
    process = start([*COMMANDS[command], "--help"])
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(number)
    (output,) = outputs_of([process], timeout=60)
    return process.returncode, output


def code_of(command: str, number: int) -> int:
    if number == signal.SIGINT:
        return 130
    return starting.EXIT_PREEMPTED if command in starting.CONTINUED else -signal.SIGTERM


ROWS = [(command, signal.SIGINT, 0) for command in COMMANDS]
ROWS += [(command, signal.SIGTERM, 0) for command in ("train", "evaluate", "convert", "plot")]
ROWS += [("train", number, delay) for number in (signal.SIGINT, signal.SIGTERM)
         for delay in (0.05, 0.2, 0.5)]  # fmt: skip


@pytest.mark.parametrize("command,number,delay", ROWS)
def test_a_signal_while_modules_are_imported(command, number, delay):
    code, output = ended_while_importing(command, number, delay)
    assert (code, output) == (code_of(command, number), "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_begins_with_it(path):
    tree = ast.parse(path.read_text())
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert ast.unparse(first) == "import dgpt_jax.starting"
    assert (path.stem in starting.CONTINUED) == ("signals.raise_on_sigterm()" in path.read_text())


def test_whoever_imports_a_command_keeps_its_signals():
    code = (
        "import signal, sys; from dgpt_jax import train, evaluate, starting; import plot;"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler;"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL;"
        "assert sys.excepthook is sys.__excepthook__"
    )
    path = f"{ROOT}{os.pathsep}{ROOT / 'tools'}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def test_a_command_in_the_background_still_ignores_ctrl_c():
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/report.py", "--help"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    (output,) = outputs_of([process], timeout=60)
    assert process.returncode == 0 and output.startswith("usage:"), output
