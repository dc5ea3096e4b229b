"""`dgpt NAME …`: one program for all commands, also as `python -m dgpt_jax NAME …`.

Imports only the module of the command that it runs, so that `dgpt --help` starts at once.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import difflib
import importlib
import sys

from dgpt_jax import invocation
from dgpt_jax._version import __version__
from dgpt_jax.distributed import early_signals
from dgpt_jax.errors import printable

MODULE_FORM = "python -m dgpt_jax"


def usage(program: str) -> str:
    """Returns the list of commands, one line each, by group."""
    lines = [f"usage: {program} COMMAND …", ""]
    previous = ""
    for entry in invocation.COMMANDS.values():
        group = entry.group if entry.group != previous else ""
        lines.append(f"  {group:11} {entry.name:11} {entry.summary}")
        previous = entry.group
    return "\n".join(
        [
            *lines,
            "",
            f"{program} COMMAND --help shows its flags. For train, tokens and evaluate,",
            "--config=list shows the configs, and --smoke is a dry run of a minute on a CPU.",
        ]
    )


def unknown(program: str, name: str) -> str:
    """Returns the error for a command that does not exist, with the one that was probably meant."""
    names = {word: c.name for c in invocation.COMMANDS.values() for word in (c.name, c.stem)}
    similar = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {program} {names[similar[0]]}?" if similar else f"see {program} help"
    return f"error: unknown command {printable(name)}: {hint}"


def main(program: str = "dgpt") -> None:
    """Runs the command that the first argument names, with the others."""
    name, *words = sys.argv[1:] or ["help"]
    if name == "help" and words:
        name, words = words[0], ["--help"]
    if name in ("help", "--help", "-h"):
        print(usage(program))
        return
    if name == "--version":
        print(f"dgpt_jax {__version__}")
        return
    if name not in invocation.COMMANDS:
        sys.exit(unknown(program, name))
    entry = invocation.COMMANDS[name]
    early_signals.install(entry.stem)
    invocation.start(program, name)
    sys.argv[1:] = words
    command = importlib.import_module(entry.module)
    from dgpt_jax import cli  # imports jax

    cli.run(command.main)


if __name__ == "__main__":
    main(MODULE_FORM)
