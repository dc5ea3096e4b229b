"""Shared by all commands: config files and overrides, `--help`, user errors as one line.

`--config=FILE[:ARG]` names a Python file whose `get_config([ARG])` returns a ConfigDict;
`--config.model.width=96` overrides a field. Values are parsed by the field's type: `1e4` is a valid
integer, `None` and `(2, 2)` are literals. `--print_config` prints the result, `--smoke` shrinks it
(config/smoke.py).
"""

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import io
import itertools
import math
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from dgpt_jax.config import renamed_keys, smoke
from dgpt_jax.config import schema as schema_lib
from dgpt_jax.distributed import early_signals, multihost, preemption
from dgpt_jax.errors import UserError, printable

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG_IMPORT = "from dgpt_jax.config import TrainConfig, default_config"


def run(main: Callable[[], None]):
    """Runs a command: a UserError becomes one line and exit code 1, Ctrl-C exit code 130.

    Of several processes one that fails aborts at once, so that the others end too.
    """
    early_signals.restore_sigint()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for names that the locale cannot print
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        return
    except UserError as e:
        status = "\n".join(map(printable, f"error: {e}".split("\n")))
    except preemption.Terminated:
        status = preemption.EXIT_PREEMPTED
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except Exception as e:
        if str(e).startswith("Unable to initialize backend"):
            status = f"error: {multihost.no_device(str(e).splitlines()[0])}"
        else:
            traceback.print_exc()
            status = 1
            if isinstance(e, OSError) and e.filename:
                status = f"error: {e.filename}: {e.strerror}"
    if multihost.is_multiprocess():
        if isinstance(status, str):
            print(status, file=sys.stderr)
        multihost.abort(status if isinstance(status, int) else 1)
    sys.exit(status)


def say(line: str):
    """Prints one line; unprintable characters of file or class names are escaped."""
    print(printable(line), flush=True)


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Context for imports of optional dependencies: if one fails, the command exits with code 1 and
    a line that says what to install (`package` as for pip)."""
    try:
        yield
    except ImportError as e:
        sys.exit(f"error: {e.name or e} is not installed: pip install {shlex.quote(package)}")


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError and suggests the nearest flag for an unknown one."""

    def __init__(self, schema: type | None = None, **kwargs):
        self._flags: list[str] = []
        self._schema, self._has_subcommands = schema, False
        super().__init__(**kwargs)

    def add_argument(self, *names: str, least: float | None = None, **kwargs) -> argparse.Action:
        """Adds an argument. least: minimum of an int (default 1) or float (default 0)."""
        if kwargs.get("type") in (int, float):
            default = 1 if kwargs["type"] is int else 0
            kwargs["type"] = _number(kwargs["type"], default if least is None else least)
        self._flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **kwargs)

    def add_subparsers(self, **kwargs):
        self._has_subcommands = True
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None):
        # Before argparse, which would report the flag that a misspelled one leaves missing.
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            if flag.startswith("--") and not self._is_known(flag):
                self.error(self._unknown(flag))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would exit."""
        raise UserError(f"{message} (see --help)")

    def _is_known(self, flag: str) -> bool:
        """True also for flags that are checked later: config keys and flags of a subcommand."""
        is_key = self._schema is not None and flag.startswith("--config.")
        return flag in self._flags or is_key or self._has_subcommands

    def _unknown(self, flag: str) -> str:
        keys = schema_lib.keys(self._schema) if self._schema else []
        flags = self._flags + [f"--config.{key}" for key in keys]
        same_name = [name for name in flags if name.endswith(f".{flag[2:]}")]
        similar = same_name or difflib.get_close_matches(flag, flags, n=1)
        suggestion = f": did you mean {' or '.join(similar)}?" if similar else ""
        return f"unknown flag {flag}{suggestion}"


def _number(kind: type, least: float) -> Callable[[str], float]:
    """Type of a flag whose value is a finite number of at least `least`."""

    def parse(text: str):
        value = kind(text)
        if not (least <= value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number >= {least}")
        return value

    parse.__name__ = kind.__name__  # shown by argparse for a value that is not a number
    return parse


def path(text: str) -> str:
    """Type of a flag that names a local or remote file or directory; expands `~`."""
    try:
        return schema_lib.expand(text)
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def local_path(text: str) -> Path:
    """Type of a flag that names a local file or directory; expands `~`."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on a local disk")
    return Path(path(text))


def parser(description: str | None, schema: type | None = None) -> Parser:
    """An argument parser; with a schema, `--config` is required and `--help` lists its fields."""
    result = Parser(
        schema,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=schema_lib.describe(schema) if schema else None,
    )
    if schema:
        result.add_argument(
            "--config", type=path, required=True, metavar="FILE.py", help="config file"
        )
        result.add_argument(
            "--print_config", action="store_true", help="print the resolved config, do nothing"
        )
        result.add_argument("--smoke", action="store_true", help=smoke.HELP)
    return result


def parse(
    flags: Parser, schema: type, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Any]:
    """(arguments, frozen config of type `schema`) after overrides. Raises UserError.

    Exits after printing if the config is to be printed.
    """
    words = sys.argv[1:] if argv is None else argv
    print_config = "--print_config" in words
    if print_config:  # no flag but --config is required
        for action in flags._actions:
            action.required = action.dest == "config"
    arguments, rest = flags.parse_known_args(words)
    config, explicit = load_config(arguments.config), []
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not key.startswith("--config."):
            flags.error(f"unknown argument {key}")
        if not equals:
            if not rest:
                flags.error(f"{key} needs a value")
            text = rest.pop(0)
        schema_lib.override(config, schema, key.removeprefix("--"), text)
        explicit.append(key.removeprefix("--config."))
    try:
        parsed = schema_lib.parse(schema, config)  # before --smoke, which would hide a typing error
        if arguments.smoke:
            if line := smoke.shrink(config, schema, explicit):
                say(line)
            parsed = schema_lib.parse(schema, config)
    except UserError:
        if print_config:  # the config, then its error
            print("\n".join(schema_lib.lines(config.to_dict())))
        raise
    if print_config:
        print("\n".join(schema_lib.lines(schema_lib.to_dict(parsed))))
        print("next: run the same command without --print_config")
        sys.exit()
    return arguments, parsed


def load_config(name: str) -> ConfigDict:
    """The ConfigDict of `FILE.py` or `FILE.py:ARG`. Raises UserError."""
    file, _, argument = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no such config file: {file}{_suggestion(path)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise UserError(f"{file} takes no argument, got :{argument}")
        return module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as e:  # a config file is arbitrary Python
        frames = traceback.extract_tb(e.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        unknown = re.search(r'Key "(\w+)" does not exist', str(e))
        reason = f"{type(e).__name__}: {e}"
        if unknown:
            reason = f"unknown config key {unknown[1]}{renamed_keys.hint(unknown[1])}"
        if isinstance(e, ImportError) and str(e.name).startswith("dgpt_jax"):
            reason = f"{str(e).partition(' (')[0]}: use `{CONFIG_IMPORT}`"
        raise UserError(f"{file}{f':{line}' if line else ''}: {reason}") from e


def _suggestion(path: Path) -> str:
    """ ": did you mean …?" with a file of similar name in its directory or in CONFIGS, or ""."""
    files = {f.stem: f for folder in (CONFIGS, path.parent) for f in folder.glob("*.py")}
    similar = difflib.get_close_matches(path.stem, files, n=1, cutoff=0.5)
    if not similar:
        return ""
    file, cwd = files[similar[0]], Path.cwd()
    return f": did you mean {file.relative_to(cwd) if file.is_relative_to(cwd) else file}?"
