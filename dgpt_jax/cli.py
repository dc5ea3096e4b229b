"""What all commands share: config files and overrides, `--help`, one clear line for a user's error.

`--config=FILE[:ARG]` names a Python file whose `get_config([ARG])` returns a ConfigDict, and
`--config.model.width=96` overrides a field. Values are read by the field's type: `1e4` is an
integer where one is due, `None` and `(2, 2)` mean what they say.
"""

import argparse
import ast
import dataclasses
import importlib.util
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path

from dgpt_jax import config as config_lib
from dgpt_jax.config import UserError


def run(main: Callable[[], None]):
    """Runs a command: a UserError becomes one line and exit code 1, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as e:
        if not e.filename:
            raise
        traceback.print_exc()
        sys.exit(f"error: {e.filename}: {e.strerror}")


def parser(description: str, schema=None) -> argparse.ArgumentParser:
    """An argument parser; with a schema, `--config` is required and `--help` lists its fields."""
    made = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_fields_help(schema) if schema else None,
    )
    if schema:
        made.add_argument("--config", required=True, metavar="FILE.py", help="config file")
    return made


def parse(made: argparse.ArgumentParser, schema, argv=None):
    """(arguments, config): the frozen config of `schema` after overrides. Raises UserError."""
    arguments, rest = made.parse_known_args(argv)
    config = load_config(arguments.config)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not key.startswith("--config."):
            made.error(f"unknown argument {key}")
        if not equals:
            if not rest:
                made.error(f"{key} needs a value")
            text = rest.pop(0)
        override(config, schema, key.removeprefix("--"), text)
    return arguments, config_lib.parse(schema, config)


def load_config(name: str):
    """The ConfigDict of `FILE.py` or `FILE.py:ARG`. Raises UserError."""
    file, _, argument = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no such config file: {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as e:  # whatever a config file may do wrong
        where = traceback.extract_tb(e.__traceback__)
        line = next((f.lineno for f in reversed(where) if f.filename == str(path)), None)
        unknown = re.search(r'Key "(\w+)" does not exist', str(e))
        reason = f"unknown config key {unknown[1]}" if unknown else f"{type(e).__name__}: {e}"
        raise UserError(f"{file}{f':{line}' if line else ''}: {reason}") from e


def override(config, schema, path: str, text: str):
    """Sets `config.model.width` in the ConfigDict to the value that `text` means there."""
    parent, names = "config", path.split(".")[1:]
    for i, name in enumerate(names):
        field = next((f for f in dataclasses.fields(schema) if f.name == name), None)
        if field is None:
            raise UserError(config_lib.unknown_key(f"{parent}.{name}", schema))
        parent, last = f"{parent}.{name}", i == len(names) - 1
        if dataclasses.is_dataclass(field.type) == last:
            what = "a group of keys" if last else "a value, not a group"
            raise UserError(f"{parent} is {what}")
        if last:
            with config.ignore_type():
                config[name] = _value(field.type, text, parent)
        else:
            config, schema = config[name], field.type


def _value(annotation, text: str, path: str):
    options = [annotation]
    if isinstance(annotation, types.UnionType):
        options = [a for a in typing.get_args(annotation) if a is not type(None)]
        if text == "None":
            return None
    kind = typing.get_origin(options[0]) or options[0]
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if kind is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{path} must be {kind.__name__}, got {text!r}")
    return value


def _fields_help(schema, prefix: str = "--config.") -> str:
    lines = []
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            lines.append(_fields_help(f.type, f"{prefix}{f.name}."))
        else:
            kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
            lines.append(f"  {prefix}{f.name} ({kind}, default {f.default!r}): {f.metadata['doc']}")
    return "\n".join(lines)
