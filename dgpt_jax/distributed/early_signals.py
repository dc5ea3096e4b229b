"""Signals to a command that still imports its modules. Every command imports this before all else.

Until `cli.run` begins, Ctrl-C ends the process with 130, and SIGTERM ends one of CONTINUED with 75:
at once, so that no import prints a trace or goes on. A process that imports the module of a command
without being that command is left alone, and so is a signal that is ignored or handled.
"""

import os
import signal
import sys

# What a scheduler's signal ends with: "try again", as sysexits has it.
EXIT_PREEMPTED = 75
# Commands that call signals.raise_on_sigterm; others leave SIGTERM to the system.
CONTINUED = ("ablate", "build_tokens", "checkpoint", "convert", "train")

_PACKAGE = os.path.dirname(os.path.realpath(__file__))
_FOLDERS = (_PACKAGE, os.path.join(os.path.dirname(_PACKAGE), "tools"))


def _exit(number, _):
    os._exit(130 if number == signal.SIGINT else EXIT_PREEMPTED)


def _begin():
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    folder, name = os.path.split(os.path.realpath(file))
    if folder not in _FOLDERS:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    continued = name.removesuffix(".py") in CONTINUED
    if continued and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def end():
    """Ctrl-C raises KeyboardInterrupt from here on; SIGTERM stays as it is."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_begin()
