"""MkDocs hook: writes the references of configs and commands from their schemas and parsers."""

import dataclasses
import importlib
import sys
from pathlib import Path

from mkdocs.structure.files import File

from dgpt_jax import cli
from dgpt_jax.config import EvaluateConfig, TokensConfig, TrainConfig

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    TrainConfig: "`python -m dgpt_jax.train`",
    TokensConfig: "`python tools/build_tokens.py`",
    EvaluateConfig: "`python -m dgpt_jax.evaluate`",
}
CONFIG_INTRODUCTION = (
    "Look up the type, default and meaning of a config key. Every key is a flag: "
    "`--config.model.depth=24`."
)


class _Captured(Exception):
    """Carries the parser of a command."""


def on_files(files, config):
    for name, text in {"config": config_page(), "cli": cli_page()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def config_page() -> str:
    """Returns a table of keys for each command that takes `--config`."""
    parts = ["# Config keys", CONFIG_INTRODUCTION]
    for schema, command in SCHEMAS.items():
        parts += [f"## {schema.__name__}", command, _table(schema, "config")]
    return "\n\n".join(parts) + "\n"


def _table(schema, prefix: str) -> str:
    rows, groups = [], []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            path = f"{prefix}.{field.name}"
            groups.append(f"### {path}\n\n{_table(field.type, path)}")
            continue
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        within = field.metadata["within"]
        doc = field.metadata["doc"] + (f"; {within}" if within else "")
        cells = (f"`{prefix}.{field.name}`", kind, f"`{field.default!r}`", doc)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = ["| key | type | default | meaning |", "|---|---|---|---|"] if rows else []
    return "\n\n".join(["\n".join(head + rows), *groups])


def cli_page() -> str:
    """Returns the `--help` of every user command, without the config keys."""
    names = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
    modules = ["dgpt_jax.train", "dgpt_jax.evaluate", *(f"dgpt_jax.commands.{n}" for n in names)]
    parts = [
        "# Commands",
        "Look up the flags of a command; its config keys have a page of their own.",
    ]
    for module in modules:
        name = module.rpartition(".")[2]
        start = f"tools/{name}.py" if "commands" in module else f"-m {module}"
        parts.append(f"## {name}\n\n```text\n{_help(module, f'python {start}')}\n```")
    return "\n\n".join(parts) + "\n"


def _help(module: str, program: str) -> str:
    def capture(parser, *_, **__):
        raise _Captured(parser)

    parse, argv = cli.Parser.parse_known_args, sys.argv
    cli.Parser.parse_known_args, sys.argv = capture, [program, "x"]
    try:
        importlib.import_module(module).main()
    except _Captured as captured:
        parser = captured.args[0]
        parser.prog, parser.epilog = program, None
        return parser.format_help().strip()
    finally:
        cli.Parser.parse_known_args, sys.argv = parse, argv
    raise RuntimeError(f"{module} parsed no arguments")
