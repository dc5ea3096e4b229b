"""The user commands, and the form in which this process was started.

`dgpt NAME` and `python -m dgpt_jax NAME` work wherever the package is installed. In a clone of the
repository `python tools/MODULE.py` and `python -m dgpt_jax.train` run the same modules. Messages
and `--help` name commands in the form in which the process was started. Imports no other module of
the package, so that all of them can use it.
"""

import os
import re
import shlex
import sys
from typing import NamedTuple

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IN_CLONE = os.path.isfile(os.path.join(_REPOSITORY, "tools", "setup_venv.sh"))


class Command(NamedTuple):
    """A user command: `dgpt NAME` runs `main()` of `module`."""

    group: str
    name: str
    module: str
    summary: str

    @property
    def stem(self) -> str:
        """Last part of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def file(self) -> str:
        """The arguments of `python` that run the command in a clone."""
        in_tools = self.module.startswith("dgpt_jax.commands.")
        return f"tools/{self.stem}.py" if in_tools else f"-m {self.module}"

    @property
    def in_clone(self) -> str:
        """Start of a command line in a clone of the repository, from its root."""
        return f"python {self.file}"


_TABLE = (
    ("data", "import", "commands.import_images", "import an image collection as a dataset"),
    ("tokens", "tokens", "commands.build_tokens", "build a token store: crops and teacher tokens"),
    ("", "verify", "commands.verify_tokens", "re-run the teacher on a token store and compare"),
    ("", "store", "commands.store", "describe, extract, merge or split token stores"),
    ("", "codecs", "commands.compare_codecs", "compare token codecs: bytes, and what is lost"),
    ("training", "pretrain", "commands.pretrain", "from a folder of images to an encoder in timm"),
    ("", "train", "train", "pretrain, fine-tune or probe; the same command resumes"),
    ("", "plot", "commands.plot", "plot curves of runs, or compare two runs"),
    ("", "report", "commands.report", "write one HTML page about a run"),
    ("", "replay", "commands.replay", "replay a step with non-finite numbers"),
    ("evaluation", "evaluate", "evaluate", "kNN, linear, few-shot and robustness evaluations"),
    ("", "results", "commands.results", "tabulate results beside published numbers"),
    ("", "embed", "commands.embed", "write an encoder's features of all images of a source"),
    ("", "visualize", "commands.visualize", "draw tokens, attention, neighbors or predictions"),
    ("export", "convert", "commands.convert", "convert weights to timm, Hugging Face and others"),
    ("", "checkpoint", "commands.checkpoint", "inspect, extract or average checkpoints"),
    ("tools", "doctor", "commands.doctor", "check whether this machine can train"),
    ("", "plan", "commands.plan", "estimate memory, speed and cost on TPUs, without TPUs"),
    ("", "quickstart", "commands.quickstart", "run the full pipeline on small images, on a CPU"),
)


def _commands() -> dict[str, Command]:
    commands, group = {}, ""
    for new_group, name, module, summary in _TABLE:
        group = new_group or group
        commands[name] = Command(group, name, f"dgpt_jax.{module}", summary)
    return commands


# By name, grouped in the order of the work.
COMMANDS = _commands()

# "dgpt" or "python -m dgpt_jax" if the process was started by one of them, and the command's name.
_program, _name = "", ""


def start(program: str, name: str) -> None:
    """Records that this process was started as `PROGRAM NAME …`."""
    global _program, _name
    _program, _name = program, name


def prog() -> str | None:
    """The name of the running command in usage messages; None: that of its file."""
    return f"{_program} {_name}" if _program else None


def command(name: str) -> str:
    """The start of a command line that runs COMMANDS[name], in the form of this process."""
    program = _program or ("" if IN_CLONE else "dgpt")
    return f"{program} {name}" if program else COMMANDS[name].in_clone


def command_line() -> str:
    """The command line of this process, to be run again."""
    words = prog() or f"python {shlex.quote(sys.argv[0])}"
    return " ".join([words, *map(shlex.quote, sys.argv[1:])])


def installation(extra: str) -> str:
    """A command that installs the package with an extra of setup.py."""
    return f"tools/setup_venv.sh {extra}" if IN_CLONE else f"pip install 'dgpt_jax[{extra}]'"


def translate(text: str) -> str:
    """Returns a docstring with its commands, written for a clone, in the form of this process."""
    for name, entry in COMMANDS.items():
        if (form := command(name)) != entry.in_clone:
            text = re.sub(rf"(?:python )?{re.escape(entry.file)}(?!\w)", form, text)
    return text
