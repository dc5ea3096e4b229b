"""Every path flag and key expands a leading ~; printed commands are quoted."""

import argparse
import shlex
import sys

import pytest

from dgpt_jax import cli
from dgpt_jax.config import roots, schema
from dgpt_jax.errors import UserError
from tests.config.ranges_test import fields, types_in
from tests.support import commands

COMMANDS = [
    name for name, path in commands.FILES.items()
    if "cli.parser(" in path.read_text() or path.parent.name == "dgpt_jax"
]  # fmt: skip
# Text flags and keys that are not paths. New ones must be added here or be paths.
NO_PATHS = {
    "background", "range",
    "names", "labels",
    "action", "activation", "codecs", "coordinator", "metrics", "platform", "remat", "rows",
    "only", "split", "study", "teacher", "topology", "workers", "image_column", "label_column",
    "keep", "size",
    "heldout",
}  # fmt: skip
NO_PATH_KEYS = {
    "activation", "best", "bad_records", "cls_mask", "codec", "coordinator", "dtype", "every",
    "features", "head", "heldout_split", "image_encoding", "interpolation", "keep_every", "kernels",
    "kind",
    "knn_test", "knn_train", "mu_dtype", "order", "platform", "pooling", "protocol", "randaugment",
    "remat", "size", "split", "targets", "task", "test", "total", "train", "trainable", "wandb",
    "warmup", "data.source", "normalize", "positions", "decoders", "freeze_steps",
}  # fmt: skip


class Captured(Exception):
    pass


def parser_of(monkeypatch, command) -> argparse.ArgumentParser:
    """Parser of a command."""

    def capture(parser, *_, **__):
        raise Captured(parser)

    monkeypatch.setattr(cli.Parser, "parse_known_args", capture)
    monkeypatch.setattr(sys, "argv", ["command", "study", "--out=x"])
    module = commands.module_of(command)
    with pytest.raises(Captured) as caught:
        module.main()
    return caught.value.args[0]


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from actions(subparser)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_text_flags_are_paths_or_listed(monkeypatch, command):
    monkeypatch.setenv("HOME", "/home/user")
    for action in actions(parser_of(monkeypatch, command)):
        takes_text = action.nargs != 0 and action.choices is None and action.type in (None, str)
        if takes_text:
            assert action.dest in NO_PATHS, f"--{action.dest} is neither cli.path nor in NO_PATHS"
        if action.type in (cli.path, cli.local_path):
            assert str(action.type("~/x")) == "/home/user/x"


@pytest.mark.parametrize("kind", [roots.TrainConfig, roots.TokensConfig, roots.EvaluateConfig])
def test_text_keys_are_paths_or_listed(kind):
    for keys, field in fields(kind):
        if str in types_in(field.type) and not field.metadata["path"]:
            assert {keys[-1], ".".join(keys)} & NO_PATH_KEYS, (
                f"{keys} is neither a path nor in NO_PATH_KEYS"
            )


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
    config = schema.default_config(roots.TrainConfig)
    schema.override(config, roots.TrainConfig, "config.data.path", text)
    assert config.data.path == path
    if path:  # as in a config file or config.json
        assert schema.parse(roots.TrainConfig, {"data": {"path": text}}).data.path == path


def test_unknown_home():
    with pytest.raises(UserError, match="config.data.path: ~nobody.there"):
        schema.parse(roots.TrainConfig, {"data": {"path": "~nobody.there/x"}})
    parser = cli.parser("description")
    parser.add_argument("--out", type=cli.path)
    with pytest.raises(UserError, match="--out: ~nobody.there"):
        parser.parse_args(["--out=~nobody.there/x"])


def test_config_file_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text(
        "from dgpt_jax.config import EvaluateConfig, default_config\n"
        "def get_config():\n  return default_config(EvaluateConfig)\n"
    )
    parser = cli.parser("description", roots.EvaluateConfig)
    words = ["--config=~/c.py", "--config.data=~/data"]
    assert cli.parse(parser, roots.EvaluateConfig, words)[1].data == str(tmp_path / "data")


def test_next_command_is_quoted(monkeypatch, capsys, tmp_path):
    from dgpt_jax.commands import import_images
    from tests.support.data import write_folder

    source, out = tmp_path / "my images", tmp_path / "my data"
    write_folder(source, 2)
    monkeypatch.setattr(sys, "argv", ["import_images.py", str(source), f"--out={out}"])
    import_images.main()
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert f"--config.source={out}" in shlex.split(line)
