"""`dgpt NAME` and `python -m dgpt_jax NAME`: names, forms of messages, exit codes."""

import importlib
import re
import subprocess
import sys

import pytest

from dgpt_jax import __main__ as dgpt
from dgpt_jax import _version, cli, invocation
from tests.support import commands
from tests.support.paths import ROOT

ENTRIES = list(invocation.COMMANDS.values())


@pytest.fixture(autouse=True)
def own_form(monkeypatch):
    """Restores how this process was started."""
    for name in ("_program", "_name"):
        monkeypatch.setattr(invocation, name, "")


def run(monkeypatch, *words, program: str = "dgpt"):
    """Runs `dgpt WORDS…` in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["/env/bin/dgpt", *words])
    try:
        dgpt.main(program)
    except SystemExit as ended:
        return ended.code
    return None


def test_all_user_commands_have_a_name():
    folders = (ROOT / "dgpt_jax", ROOT / "dgpt_jax/commands")
    stems = {stem for stem, path in commands.FILES.items() if path.parent in folders}
    assert {entry.stem for entry in ENTRIES} == stems
    assert not set(invocation.COMMANDS) & {"help", "list"}


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_fits_a_screen(monkeypatch, capsys, words):
    assert run(monkeypatch, *words) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for entry in ENTRIES:
        assert (
            sum(f" {entry.name} " in line and line.endswith(entry.summary) for line in lines) == 1
        )


def test_the_list_imports_no_large_package():
    code = (
        "import sys; from dgpt_jax.__main__ import main; sys.argv = ['dgpt', '--help']; main();"
        "sys.exit(bool({'jax', 'numpy', 'ml_collections', 'etils'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "name,hint",
    [
        ("conver", "did you mean dgpt convert?"),
        ("Train", "did you mean dgpt train?"),
        ("build_tokens", "did you mean dgpt tokens?"),
        ("import-images", "did you mean dgpt import?"),
        ("verify_tokens", "did you mean dgpt verify?"),
        ("compare_codecs", "did you mean dgpt codecs?"),
        ("zzz", "see dgpt help"),
        ("--smoke", "see dgpt help"),
        ("", "see dgpt help"),
        ("a\x1b", "see dgpt help"),
    ],
)
def test_an_unknown_command(monkeypatch, name, hint):
    """sys.exit prints the line to stderr and ends with 1."""
    message = run(monkeypatch, name)
    assert message == f"error: unknown command {name}: {hint}".replace("\x1b", "\\x1b")


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") is None
    assert capsys.readouterr().out == f"dgpt_jax {_version.__version__}\n"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
@pytest.mark.parametrize("program", ["dgpt", "python -m dgpt_jax"])
def test_help_and_bad_input_of_each(monkeypatch, capsys, entry, program):
    assert not run(monkeypatch, entry.name, "--help", program=program)
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {program} {entry.name} ")
    assert "tools/" not in shown and "dgpt_jax." not in shown
    assert program != "dgpt" or max(map(len, shown.splitlines())) <= 100
    assert not run(monkeypatch, "help", entry.name, program=program)
    assert capsys.readouterr().out == shown
    message = run(monkeypatch, entry.name, "--qqqqqqqqq", program=program)
    assert message == "error: unknown flag --qqqqqqqqq (see --help)"


@pytest.mark.parametrize(
    "program,in_clone,expected",
    [
        ("dgpt", True, "dgpt convert"),
        ("dgpt", False, "dgpt convert"),
        ("python -m dgpt_jax", False, "python -m dgpt_jax convert"),
        ("", True, "python tools/convert.py"),
        ("", False, "dgpt convert"),  # from Python, or python -m dgpt_jax.train
    ],
)
def test_messages_name_commands_in_the_form_of_the_process(
    monkeypatch, program, in_clone, expected
):
    monkeypatch.setattr(invocation, "IN_CLONE", in_clone)
    if program:
        invocation.start(program, "train")
    assert invocation.command("convert") == expected
    text = "(tools/convert.py RUN), python tools/convert.py, tools/converter.py"
    translated = f"({expected} RUN), {expected}, tools/converter.py"
    assert invocation.translate(text) == (text if "tools" in expected else translated)
    trained = "python -m dgpt_jax.train" if "tools" in expected else f"{program or 'dgpt'} train"
    text = "`python -m dgpt_jax.train`, dgpt_jax.training"
    assert invocation.translate(text) == f"`{trained}`, dgpt_jax.training"
    monkeypatch.setattr(sys, "argv", ["tools/x.py", "--config.a=b c"])
    started = f"{program} train" if program else "python tools/x.py"
    assert invocation.command_line() == f"{started} '--config.a=b c'"


def test_no_message_is_fixed_to_a_clone():
    """Strings that are shown name commands by invocation.command; docstrings are translated."""
    bad = []
    for path in (ROOT / "dgpt_jax").rglob("*.py"):
        code = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
        for line in code.splitlines():
            if path.name == "invocation.py" or line.lstrip().startswith("#"):
                continue
            if re.search(r"tools/\w+\.py|python -m dgpt_jax\.|configs/\w+\.py", line):
                bad.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    # The mark by which exports recognize their own cards.
    assert [line for line in bad if 'card.py: return f"<!-- written by' not in line] == []


def test_the_same_code_as_in_tools():
    for entry in ENTRIES:
        if entry.file.startswith("tools/"):
            text = (ROOT / entry.file).read_text()
            assert f"from {entry.module} import main\n" in text and "cli.run(main)" in text


@pytest.mark.parametrize(
    "error,status",
    [
        (None, None),
        (KeyboardInterrupt, 130),
        (ValueError, 1),
        (BrokenPipeError, 1),
        (SystemExit(7), 7),
    ],
    ids=str,
)
def test_exit_codes_are_those_of_the_command(monkeypatch, error, status):
    module = importlib.import_module("dgpt_jax.commands.results")

    def main():
        assert sys.argv == ["/env/bin/dgpt", "a", "--b"]
        if error:
            raise error

    monkeypatch.setattr(module, "main", main)
    assert run(monkeypatch, "results", "a", "--b") == status
    assert cli.invocation.command("plot") == "dgpt plot"
