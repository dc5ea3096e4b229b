"""All commands by name, studies and benchmarks included."""

import importlib
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT

FOLDERS = (
    "dgpt_jax",
    "dgpt_jax/commands",
    "dgpt_jax/examples",
    "tools/studies",
    "tools/benchmarks",
)
_PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
FILES = {path.stem: path for path in _PATHS if "\n    cli.run(main)\n" in path.read_text()}


def module_of(name: str) -> ModuleType:
    """Returns the module whose `main()` is the command."""
    return importlib.import_module(dotted(FILES[name]))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def words_of(name: str) -> list:
    """Returns the arguments of `python` that start the command."""
    user = FILES[name].parent.name == "commands"
    return [ROOT / f"tools/{name}.py"] if user else ["-m", dotted(FILES[name])]
