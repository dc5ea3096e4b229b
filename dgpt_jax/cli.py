"""What all commands share: config files and overrides, `--help`, one clear line for a user's error.

`--config=FILE[:ARG]` names a Python file whose `get_config([ARG])` returns a ConfigDict, and
`--config.model.width=96` overrides a field. Values are read by the field's type: `1e4` is an
integer where one is due, `None` and `(2, 2)` mean what they say.
"""

import argparse
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from dgpt_jax import hosts, signals
from dgpt_jax import schema as schema_lib
from dgpt_jax.schema import UserError


def run(main: Callable[[], None]):
    """Runs a command: a UserError becomes one line and exit code 1, Ctrl-C exit code 130.

    One of several processes ends at once on any error, so that the others end too.
    """
    try:
        main()
        return
    except UserError as e:
        ending = f"error: {e}"
    except signals.Terminated:
        ending = signals.EXIT_PREEMPTED
    except KeyboardInterrupt:
        ending = 130
    except BrokenPipeError:
        ending = 1
    except Exception as e:
        traceback.print_exc()
        named = isinstance(e, OSError) and e.filename
        ending = f"error: {e.filename}: {e.strerror}" if named else 1
    if hosts.together():
        if isinstance(ending, str):
            print(ending, file=sys.stderr)
        hosts.end(ending if isinstance(ending, int) else 1)
    sys.exit(ending)


def parser(description: str, schema=None) -> argparse.ArgumentParser:
    """An argument parser; with a schema, `--config` is required and `--help` lists its fields."""
    made = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=schema_lib.describe(schema) if schema else None,
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
        schema_lib.override(config, schema, key.removeprefix("--"), text)
    return arguments, schema_lib.parse(schema, config)


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
