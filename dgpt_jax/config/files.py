"""Config files: those of the package by name, others by path.

A config file is Python whose `get_config([ARG])` returns a ConfigDict. `NAME` is a file of
configs/, which a wheel contains as dgpt_jax/configs; what ends in .py is a path.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import re
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from dgpt_jax.config import renamed_keys
from dgpt_jax.errors import ChoiceError, UserError

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "configs"  # a wheel's (setup.py); a clone has configs/ beside the package
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
CONFIG_IMPORT = "from dgpt_jax.config import TrainConfig, default_config"
_LINE = 100  # characters of a line of the listing


def load_config(name: str) -> ConfigDict:
    """The ConfigDict of `NAME`, `FILE.py`, `NAME:ARG` or `FILE.py:ARG`. Raises UserError."""
    file, _, argument = name.partition(":")
    path = find(file)
    with _errors_of(file, path):
        module = _load(file, path)
        if argument and not inspect.signature(module.get_config).parameters:
            raise UserError(f"{file} takes no argument, got :{argument}")
        return module.get_config(*([argument] if argument else []))


def find(name: str) -> Path:
    """The file of a config, given by path (FILE.py) or name. Raises UserError if it is missing."""
    path, named = Path(name), CONFIGS / f"{name}.py"
    if _is_name(name) and named.is_file():
        return named
    if not path.is_file():
        kind = "config" if _is_name(name) else "config file"
        raise UserError(f"no such {kind}: {name}{_suggestion(path)}")
    return path


def _is_name(text: str) -> bool:
    return text != "" and "/" not in text and not text.endswith(".py")


def _suggestion(path: Path) -> str:
    """ ": did you mean …?" with a similar file of its directory or name in CONFIGS, or ""."""
    names = {file.stem: file.stem for file in CONFIGS.glob("*.py")}
    cwd = Path.cwd()
    for file in () if _is_name(str(path)) else path.parent.glob("*.py"):
        names[file.stem] = str(file.relative_to(cwd) if file.is_relative_to(cwd) else file)
    similar = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    if similar:
        return f": did you mean {names[similar[0]]}?"
    return ": --config=list prints all" if _is_name(str(path)) else ""


def _load(file: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _errors_of(file: str, path: Path) -> Iterator[None]:
    """Context in which code of a config file runs: its errors become UserError with the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # a config file is arbitrary Python
        own = str(path.absolute())
        frames = traceback.extract_tb(e.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == own), None)
        unknown = re.search(r'Key "(\w+)" does not exist', str(e))
        reason = f"{type(e).__name__}: {e}"
        if unknown:
            reason = f"unknown config key {unknown[1]}{renamed_keys.hint(unknown[1])}"
        if isinstance(e, ImportError) and str(e.name).startswith("dgpt_jax"):
            reason = f"{str(e).partition(' (')[0]}: use `{CONFIG_IMPORT}`"
        raise UserError(f"{file}{f':{line}' if line else ''}: {reason}") from e


def listing(schemas: Sequence[type]) -> list[str]:
    """Returns a line for each config of the package that is one of the schemas: its name, the first
    line of its docstring, and the values of its argument."""
    keys = [{field.name for field in dataclasses.fields(schema)} for schema in schemas]
    rows = []
    for path in sorted(CONFIGS.glob("*.py")):
        with _errors_of(path.stem, path):
            module = _load(path.stem, path)
            if set(module.get_config()) in keys:
                rows.append((path.stem, (module.__doc__ or "").split("\n")[0], arguments(module)))
    width = max(len(name) for name, _, _ in rows)
    lines = []
    for name, about, values in rows:
        tail = f"  :{'|'.join(values)}" if values else ""
        room = _LINE - width - 2 - len(tail)
        lines.append(f"{name:{width}}  {textwrap.shorten(about, room, placeholder=' …')}{tail}")
    lines.append(f"next: set --config=NAME or NAME:ARG; to change one, copy it from {CONFIGS}")
    return lines


def arguments(module: ModuleType) -> list[str]:
    """Returns the values that the argument of a config file can take, the default first; none if it
    takes none, or does not check it by `check_choice`."""
    parameters = list(inspect.signature(module.get_config).parameters.values())
    if not parameters:
        return []
    try:
        module.get_config("?")
    except ChoiceError as e:
        return sorted(e.allowed, key=lambda value: value != parameters[0].default)
    except Exception:  # other checks of its own
        return []
    return []
