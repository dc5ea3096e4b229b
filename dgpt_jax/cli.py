"""What all commands share: config files and overrides, `--help`, one clear line for a user's error.

`--config=FILE[:ARG]` names a Python file whose `get_config([ARG])` returns a ConfigDict, and
`--config.model.width=96` overrides a field. Values are read by the field's type: `1e4` is an
integer where one is due, `None` and `(2, 2)` mean what they say. `--print_config` shows the result,
`--smoke` shrinks it (smoke.py).
"""

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import itertools
import math
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from dgpt_jax import hosts, signals, smoke, starting
from dgpt_jax import schema as schema_lib
from dgpt_jax.schema import UserError, printable

CONFIGS = Path(__file__).parent.parent / "configs"


def run(main: Callable[[], None]):
    """Runs a command: a UserError becomes one line and exit code 1, Ctrl-C exit code 130.

    One of several processes ends at once on any error, so that the others end too.
    """
    starting.end()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the locale cannot print
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        return
    except UserError as e:
        ending = "\n".join(map(printable, f"error: {e}".split("\n")))
    except signals.Terminated:
        ending = signals.EXIT_PREEMPTED
    except KeyboardInterrupt:
        ending = 130
    except BrokenPipeError:
        ending = 1
    except Exception as e:
        named = isinstance(e, OSError) and e.filename
        if str(e).startswith("Unable to initialize backend"):
            ending = f"error: {hosts.no_device(str(e).splitlines()[0])}"
        else:
            traceback.print_exc()
            ending = f"error: {e.filename}: {e.strerror}" if named else 1
    if hosts.together():
        if isinstance(ending, str):
            print(ending, file=sys.stderr)
        hosts.end(ending if isinstance(ending, int) else 1)
    sys.exit(ending)


def say(line: str):
    """Prints one line that may hold names of files or classes."""
    print(printable(line), flush=True)


@contextlib.contextmanager
def needs(package: str):
    """A context for imports of what not every installation has: where one fails, the command ends
    with a line that says what to install (`package` as pip takes it), and exit code 1."""
    try:
        yield
    except ImportError as e:
        sys.exit(f"error: {e.name or e} is not installed: pip install {shlex.quote(package)}")


class Parser(argparse.ArgumentParser):
    """One whose mistakes are UserErrors: one line, that names the nearest flag for an unknown."""

    def __init__(self, schema=None, **kwargs):
        self._flags: list[str] = []
        self._schema, self._parts = schema, False
        super().__init__(**kwargs)

    def add_argument(self, *names, least: float | None = None, **kwargs):
        """As argparse's. least: of an int (default 1) or float (default 0)."""
        if kwargs.get("type") in (int, float):
            usual = 1 if kwargs["type"] is int else 0
            kwargs["type"] = _number(kwargs["type"], usual if least is None else least)
        self._flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **kwargs)

    def add_subparsers(self, **kwargs):
        self._parts = True
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse, which would first complain of what a misspelt flag leaves missing.
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            if flag.startswith("--") and not self._is_known(flag):
                self.error(self._unknown(flag))
        return super().parse_known_args(words, namespace)

    def error(self, message):
        raise UserError(f"{message} (--help lists what is taken)")

    def _is_known(self, flag: str) -> bool:
        """Or left to others: the keys of a config, the flags of a subcommand."""
        key = self._schema is not None and flag.startswith("--config.")
        return flag in self._flags or key or self._parts

    def _unknown(self, flag: str) -> str:
        keys = schema_lib.keys(self._schema) if self._schema else []
        known = self._flags + [f"--config.{key}" for key in keys]
        same = [name for name in known if name.endswith(f".{flag[2:]}")]
        near = same or difflib.get_close_matches(flag, known, n=1)
        return f"unknown flag {flag}" + (f": did you mean {' or '.join(near)}?" if near else "")


def _number(kind: type, least: float) -> Callable[[str], float]:
    """The type of a flag that is a finite number of at least `least`."""

    def parse(text: str):
        value = kind(text)
        if not (least <= value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
        return value

    parse.__name__ = kind.__name__  # by which argparse calls what is no number
    return parse


def path(text: str) -> str:
    """The type of a flag that names a file or directory, local or remote: `~` is expanded."""
    try:
        return schema_lib.expand(text)
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def local_path(text: str) -> Path:
    """The same of one that is always local."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on a local disk")
    return Path(path(text))


def parser(description: str, schema=None) -> Parser:
    """An argument parser; with a schema, `--config` is required and `--help` lists its fields."""
    made = Parser(
        schema,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=schema_lib.describe(schema) if schema else None,
    )
    if schema:
        made.add_argument(
            "--config", type=path, required=True, metavar="FILE.py", help="config file"
        )
        made.add_argument(
            "--print_config", action="store_true", help="print the resolved config, do nothing"
        )
        made.add_argument("--smoke", action="store_true", help=smoke.HELP)
    return made


def parse(made: Parser, schema, argv=None):
    """(arguments, config): the frozen config of `schema` after overrides. Raises UserError.

    Ends the command where the config is to be printed.
    """
    words = sys.argv[1:] if argv is None else argv
    shown = "--print_config" in words
    if shown:  # of the flags that are required, --config is enough
        for action in made._actions:
            action.required = action.dest == "config"
    arguments, rest = made.parse_known_args(words)
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
    if arguments.smoke:
        smoke.shrink(config, schema)
    try:
        parsed = schema_lib.parse(schema, config)
    except UserError:
        if shown:  # what there is, then what is wrong with it
            print("\n".join(schema_lib.lines(config.to_dict())))
        raise
    if shown:
        print("\n".join(schema_lib.lines(schema_lib.to_dict(parsed))))
        print("next: the same command without --print_config")
        sys.exit()
    return arguments, parsed


def load_config(name: str):
    """The ConfigDict of `FILE.py` or `FILE.py:ARG`. Raises UserError."""
    file, _, argument = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no such config file: {file}{_nearest(path)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise UserError(f"{file} takes no argument, got :{argument}")
        return module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as e:  # whatever a config file may do wrong
        where = traceback.extract_tb(e.__traceback__)
        line = next((f.lineno for f in reversed(where) if f.filename == str(path)), None)
        unknown = re.search(r'Key "(\w+)" does not exist', str(e))
        reason = f"unknown config key {unknown[1]}" if unknown else f"{type(e).__name__}: {e}"
        raise UserError(f"{file}{f':{line}' if line else ''}: {reason}") from e


def _nearest(path: Path) -> str:
    """ ": did you mean …?", of the files beside it and of this repository, by their names."""
    files = {f.stem: f for folder in (CONFIGS, path.parent) for f in folder.glob("*.py")}
    near = difflib.get_close_matches(path.stem, files, n=1, cutoff=0.5)
    if not near:
        return ""
    file, here = files[near[0]], Path.cwd()
    return f": did you mean {file.relative_to(here) if file.is_relative_to(here) else file}?"
