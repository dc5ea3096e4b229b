"""MkDocs hook: writes the references of configs and commands from their schemas and parsers."""

import dataclasses
import importlib
import sys

from mkdocs.structure.files import File

from dgpt_jax import cli, invocation
from dgpt_jax.config import EvaluateConfig, TokensConfig, TrainConfig
from dgpt_jax.config import schema as schema_lib

SCHEMAS = {TrainConfig: "train", TokensConfig: "tokens", EvaluateConfig: "evaluate"}
CONFIG_INTRODUCTION = (
    "Look up the type, default and meaning of a config key. Every key is a flag: "
    "`--config.model.depth=24`."
)
CLI_INTRODUCTION = "Look up the flags of a command; its config keys have a page of their own."


class _Captured(Exception):
    """Carries the parser of a command."""


def on_files(files, config):
    for name, text in {"config": config_page(), "cli": cli_page()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def config_page() -> str:
    """Returns a table of keys for each command that takes `--config`."""
    parts = ["# Config keys", CONFIG_INTRODUCTION]
    for schema, name in SCHEMAS.items():
        parts += [f"## {schema.__name__}", _forms(name), _table(schema, "config")]
    return "\n\n".join(parts) + "\n"


def _table(schema, prefix: str) -> str:
    rows, groups = [], []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            path = f"{prefix}.{field.name}"
            groups.append(f"### {path}\n\n{_table(field.type, path)}")
            continue
        if named := schema_lib.named_schema(field):
            path = f"{prefix}.{field.name}.NAME"
            groups.append(
                f"### {path}\n\nA group: {field.metadata['doc']}\n\n{_table(named, path)}"
            )
            continue
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        within = field.metadata["within"]
        doc = field.metadata["doc"] + (f"; {within}" if within else "")
        cells = (f"`{prefix}.{field.name}`", kind, f"`{field.default!r}`", doc)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = ["| key | type | default | meaning |", "|---|---|---|---|"] if rows else []
    return "\n\n".join(["\n".join(head + rows), *groups])


def _forms(name: str) -> str:
    """The command line of a command once installed, and in a clone."""
    return f"`dgpt {name}`, in a clone also `{invocation.COMMANDS[name].in_clone}`"


def cli_page() -> str:
    """Returns the `--help` of every user command, without the config keys."""
    dgpt = importlib.import_module("dgpt_jax.__main__")
    parts = ["# Commands", CLI_INTRODUCTION, f"```text\n{dgpt.usage('dgpt')}\n```"]
    for name, entry in invocation.COMMANDS.items():
        parts += [f"## {name}", _forms(name), f"```text\n{_help(entry)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(entry: invocation.Command) -> str:
    def capture(parser, *_, **__):
        raise _Captured(parser)

    parse, argv = cli.Parser.parse_known_args, sys.argv
    cli.Parser.parse_known_args, sys.argv = capture, ["dgpt", "x"]
    invocation.start("dgpt", entry.name)
    try:
        importlib.import_module(entry.module).main()
    except _Captured as captured:
        parser = captured.args[0]
        parser.epilog = None
        return parser.format_help().strip()
    finally:
        cli.Parser.parse_known_args, sys.argv = parse, argv
    raise RuntimeError(f"{entry.module} parsed no arguments")
