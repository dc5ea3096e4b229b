"""A leading ~ is expanded in every path flag and path key; printed commands can be pasted."""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

import pytest

from dgpt_jax import cli, config, evaluate, schema, train
from dgpt_jax.schema import UserError
from tests.ranges_test import fields, types_in

TOOLS = Path(__file__).parent.parent / "tools"
COMMANDS = [
    path.stem for path in sorted(TOOLS.glob("*.py")) if "cli.parser(" in path.read_text()
] + [train, evaluate]
# Flags and keys whose text is not a path. Whatever is new must be added here, or be one.
NO_PATHS = {
    "background", "range",
    "action", "activation", "codecs", "coordinator", "metrics", "platform", "remat", "rows",
    "split", "study", "topology", "workers",
}  # fmt: skip
NO_PATH_KEYS = {
    "activation", "best", "bad_records", "cls_mask", "codec", "coordinator", "dtype", "every",
    "features", "head", "heldout_split", "interpolation", "keep_every", "kind", "knn_test",
    "knn_train", "mu_dtype", "order", "picture", "platform", "pooling", "protocol", "randaugment",
    "remat", "size", "split", "targets", "task", "test", "total", "train", "wandb", "warmup",
    "data.source",
}  # fmt: skip


class Captured(Exception):
    pass


def parser_of(monkeypatch, command) -> argparse.ArgumentParser:
    """The parser that a command makes."""

    def capture(parser, *_, **__):
        raise Captured(parser)

    monkeypatch.setattr(cli.Parser, "parse_known_args", capture)
    monkeypatch.setattr(sys, "argv", ["command", "study", "--out=x"])
    module = importlib.import_module(command) if isinstance(command, str) else command
    with pytest.raises(Captured) as caught:
        module.main()
    return caught.value.args[0]


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from actions(one)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: getattr(c, "__name__", c))
def test_a_flag_is_a_path_or_known_to_be_none(monkeypatch, command):
    monkeypatch.setenv("HOME", "/home/user")
    for action in actions(parser_of(monkeypatch, command)):
        takes_text = action.nargs != 0 and action.choices is None and action.type in (None, str)
        if takes_text:
            assert action.dest in NO_PATHS, f"--{action.dest} is no cli.path"
        if action.type in (cli.path, cli.local_path):
            assert str(action.type("~/x")) == "/home/user/x"


@pytest.mark.parametrize("kind", [config.Train, config.Tokens, config.Evaluate])
def test_a_key_is_a_path_or_known_to_be_none(kind):
    for keys, field in fields(kind):
        if str in types_in(field.type) and not field.metadata["path"]:
            assert {keys[-1], ".".join(keys)} & NO_PATH_KEYS, f"{keys} is no path"


@pytest.mark.parametrize(
    "text,path",
    [
        ("~/x", "/home/user/x"), ("~", "/home/user"), ("x/~", "x/~"), ("./~/x", "./~/x"),
        ("gs://bucket/~/x", "gs://bucket/~/x"), ("", ""),
    ],
)  # fmt: skip
def test_expansion(monkeypatch, text, path):
    monkeypatch.setenv("HOME", "/home/user")
    assert cli.path(text) == path
    made = schema.default(config.Train)
    schema.override(made, config.Train, "config.data.path", text)
    assert made.data.path == path
    if path:  # as a config file or config.json has it
        assert schema.parse(config.Train, {"data": {"path": text}}).data.path == path


def test_a_home_that_nobody_has():
    with pytest.raises(UserError, match="config.data.path: ~nobody.there of ~nobody.there/x is no"):
        schema.parse(config.Train, {"data": {"path": "~nobody.there/x"}})
    parser = cli.parser("what it does")
    parser.add_argument("--out", type=cli.path)
    with pytest.raises(UserError, match="argument --out: ~nobody.there of ~nobody.there/x is no"):
        parser.parse_args(["--out=~nobody.there/x"])


def test_the_config_file_may_be_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text(
        "from dgpt_jax.config import Evaluate\nfrom dgpt_jax.schema import default\n"
        "def get_config():\n  return default(Evaluate)\n"
    )
    parser = cli.parser("what it does", config.Evaluate)
    words = ["--config=~/c.py", "--config.data=~/data"]
    assert cli.parse(parser, config.Evaluate, words)[1].data == str(tmp_path / "data")


def test_the_next_command_is_quoted(monkeypatch, capsys, tmp_path):
    import import_images

    from tests.data import write_folder

    source, out = tmp_path / "my images", tmp_path / "my data"
    write_folder(source, 2)
    monkeypatch.setattr(sys, "argv", ["import_images.py", str(source), f"--out={out}"])
    import_images.main()
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert f"--config.source={out}" in shlex.split(line)
