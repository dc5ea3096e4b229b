"""Lines `next: …`: commands that can be pasted, or sentences that begin with a verb."""

import ast
import re
import shlex
import sys
from types import SimpleNamespace

import pytest

from dgpt_jax.commands import next_commands
from dgpt_jax.config import TeacherConfig, TrainConfig, schema
from dgpt_jax.training.tasks import classify, pretrain
from dgpt_jax.training.tasks.targets import Target
from tests.support import commands, data
from tests.support.paths import ROOT

VERBS = (
    "add", "build", "evaluate", "fix", "inspect", "load", "look", "open", "read", "run", "set",
    "start", "wait",
)  # fmt: skip
SPACES = "/a b/c"
CONFIG = schema.parse(TrainConfig, {"model": data.TINY, "data": {"path": "x"}})
TARGET = {"": Target(24, (4, 4), cls=True)}
TASK = pretrain.PretrainTask(CONFIG, TARGET)
SPLITS = SimpleNamespace(splits=[SimpleNamespace(label=None)])
UNLABELLED = pretrain.PretrainTask(CONFIG, TARGET, examples=SimpleNamespace(sources=SPLITS))  # pyright: ignore[reportArgumentType]
COMMANDS = {
    "train": next_commands.train(SPACES, SPACES),
    "verify": next_commands.verify_tokens(SPACES, TeacherConfig(weights=SPACES, heads=2)),
    "small store": next_commands.train(SPACES, SPACES, examples=180),
    "pretrained": TASK.next_command.format(workdir=shlex.quote(SPACES)),
    "pretrained without labels": UNLABELLED.next_command.format(workdir=shlex.quote(SPACES)),
    "classifier": classify.ClassificationTask(CONFIG).next_command.format(
        workdir=shlex.quote(SPACES)
    ),
}


def literal_lines() -> dict[str, str]:
    """{file:line: text of a line after "next: "} of all string literals; {} for inserted values."""
    lines = {}
    for path in sorted((ROOT / "dgpt_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = _text(node).strip()
            if text.startswith("next: "):  # an f-string comes before its parts
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                lines.setdefault(where, text.removeprefix("next: "))
    return lines


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def script_lines() -> dict[str, str]:
    """The same of the launch scripts."""
    pattern = re.compile(r"next: ([^\"]*)\"|\bnext \"(.*?)\" (?:&&|;;)")
    lines = {}
    for path in sorted((ROOT / "tools/launch").glob("*.sh")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for match in pattern.finditer(line):
                lines[f"{path.name}:{number}"] = match[1] or match[2]
    return lines


def test_each_line_is_a_command_or_begins_with_a_verb():
    lines = literal_lines() | script_lines()
    assert len(lines) > 25
    for where, text in lines.items():
        if text.startswith(("python ", "{}", "$")):  # an inserted command is checked below
            continue
        assert text.partition(" ")[0] in VERBS, f"{where}: {text}"


@pytest.fixture(scope="module")
def help_of():
    """Returns a function: words after `python` of a command → its --help."""
    texts = {}

    def help_text(script: str, capsys, monkeypatch) -> str:
        if script not in texts:
            name = script.rpartition(".")[2] if script.startswith("dgpt_jax") else script[6:-3]
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit):
                commands.module_of(name).main()
            texts[script] = capsys.readouterr().out
        return texts[script]

    return help_text


LITERAL_COMMANDS = [text for text in literal_lines().values() if text.startswith("python ")]


@pytest.mark.parametrize("text", [*LITERAL_COMMANDS, *COMMANDS.values()])
def test_commands_can_be_pasted(text, help_of, capsys, monkeypatch):
    """Existing scripts and configs, known flags, quoted paths."""
    python, *words = shlex.split(text)
    assert python == "python" and "…" not in text
    script = words[1] if words[0] == "-m" else words[0]
    shown = help_of(script, capsys, monkeypatch)
    for word in words:
        flag, _, value = word.partition("=")
        if flag.startswith("--"):
            assert re.search(rf"{re.escape(flag)}\b", shown), f"{script} has no {flag}"
        if flag == "--config":
            assert (ROOT / f"configs/{value}.py").is_file()
    if text in COMMANDS.values():
        assert any(word.endswith(SPACES) for word in words)
