"""Shared by all commands: config files and overrides, `--help`, user errors as one line.

`--config=NAME[:ARG]` or `--config=FILE.py[:ARG]` loads a config (config/files.py), `--config=list`
prints the names; `--config.model.width=96` overrides a field. Values are parsed by the field's
type: `1e4` is a valid integer, `None` and `(2, 2)` are literals. `--print_config` prints the
result, `--smoke` shrinks it (config/smoke.py).
"""

import argparse
import contextlib
import difflib
import io
import itertools
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from dgpt_jax import invocation
from dgpt_jax.config import field_values, files, smoke
from dgpt_jax.config import schema as schema_lib
from dgpt_jax.config.files import load_config
from dgpt_jax.distributed import early_signals, multihost, preemption
from dgpt_jax.errors import UserError, printable


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
def needs(extra: str) -> Iterator[None]:
    """Context for imports of optional dependencies: if one fails, the command exits with code 1 and
    a line that says how to install the extra of setup.py."""
    try:
        yield
    except ImportError as e:
        sys.exit(f"error: {e.name or e} is not installed: {invocation.installation(extra)}")


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
        return field_values.expand(text)
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def local_path(text: str) -> Path:
    """Type of a flag that names a local file or directory; expands `~`."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on a local disk")
    return Path(path(text))


class _Config(argparse.Action):
    """Stores `--config`; of `--config=list`, prints the configs of `schemas` and exits."""

    schemas: Sequence[type] = ()

    def __call__(self, parser, namespace, values, option_string=None):
        if values == "list":
            print("\n".join(files.listing(self.schemas)))
            parser.exit()
        setattr(namespace, self.dest, values)


def parser(description: str | None, schema: type | None = None, *others: type) -> Parser:
    """An argument parser; with a schema, `--config` is required and `--help` lists its fields.

    description: a docstring that names commands as in a clone. others: further schemas whose
    configs the command takes.
    """
    result = Parser(
        schema,
        prog=invocation.prog(),
        description=description and invocation.translate(description),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=schema_lib.describe(schema) if schema else None,
    )
    if schema:
        action = result.add_argument(
            "--config", action=_Config, type=path, required=True, metavar="NAME",
            help="NAME or FILE.py, with :ARG if it takes one; list prints the names",
        )  # fmt: skip
        cast(_Config, action).schemas = (schema, *others)
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
