"""Signals to a command that is still importing its modules."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgpt_jax.distributed import early_signals
from tests.support import commands
from tests.support.paths import ROOT
from tests.support.processes import outputs_of, start

COMMANDS = {name: commands.words_of(name) for name in commands.FILES}
CONSOLE_SCRIPT = "import sys\nfrom dgpt_jax.__main__ import main\nsys.exit(main())\n"  # pip's


def signal_during_import(words, number: int, delay: float) -> tuple[int, str]:
    """(exit code, output) of a command that gets a signal `delay` seconds after the import of its
    large modules starts."""
    process = start([*words, "--help"])
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(number)
    (output,) = outputs_of([process], timeout=60)
    return process.returncode, output


def expected_code(command: str, number: int) -> int:
    if number == signal.SIGINT:
        return 130
    return early_signals.EXIT_PREEMPTED if command in early_signals.RESUMABLE else -signal.SIGTERM


ROWS = [(command, signal.SIGINT, 0) for command in COMMANDS]
ROWS += [(command, signal.SIGTERM, 0) for command in ("train", "evaluate", "convert", "plot")]
ROWS += [("train", number, delay) for number in (signal.SIGINT, signal.SIGTERM)
         for delay in (0.05, 0.2, 0.5)]  # fmt: skip


@pytest.mark.parametrize("command,number,delay", ROWS)
def test_a_signal_during_import_exits_silently(command, number, delay):
    code, output = signal_during_import(COMMANDS[command], number, delay)
    assert (code, output) == (expected_code(command, number), "")


@pytest.mark.parametrize("form", ["console script", "module"])
@pytest.mark.parametrize(
    "name,command,number",
    [
        ("train", "train", signal.SIGINT),
        ("train", "train", signal.SIGTERM),
        ("tokens", "build_tokens", signal.SIGTERM),
        ("verify", "verify_tokens", signal.SIGTERM),
    ],
)
def test_a_signal_to_dgpt_does_the_same(tmp_path, form, name, command, number):
    script = tmp_path / "any bin/dgpt"
    script.parent.mkdir()
    script.write_text(CONSOLE_SCRIPT)
    words = [script, name] if form == "console script" else ["-m", "dgpt_jax", name]
    code, output = signal_during_import(words, number, 0)
    assert (code, output) == (expected_code(command, number), "")


@pytest.mark.parametrize("name", commands.FILES)
def test_every_command_imports_it_first(name):
    path = commands.FILES[name]
    tree = ast.parse(path.read_text())
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert ast.unparse(first) == "import dgpt_jax.distributed.early_signals"
    assert (path.stem in early_signals.RESUMABLE) == (
        "preemption.raise_on_sigterm()" in path.read_text()
    )


def test_importing_a_command_keeps_the_signal_handlers():
    code = (
        "import signal, sys; from dgpt_jax import train, evaluate;"
        "from dgpt_jax.commands import plot;"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler;"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL;"
        "assert sys.excepthook is sys.__excepthook__"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_background_command_still_ignores_ctrl_c():
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/results.py", "--help"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    (output,) = outputs_of([process], timeout=60)
    assert process.returncode == 0 and output.startswith("usage:"), output
