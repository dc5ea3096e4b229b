"""Signal handlers for the time in which a command imports its modules; its first import.

Until `cli.run` starts, Ctrl-C exits with 130, and SIGTERM exits with 75 from the commands in
RESUMABLE: at once, without a traceback of an import. Processes that import a command's module
without running it keep their handlers, and so do signals that are ignored or already handled.
A command that is started by its file is recognized here; `dgpt NAME` calls `install`.

A process whose environment has PARENT, the id of the one that started it, gets SIGTERM when that
one ends, however it ends (Linux).
"""

import os
import signal
import sys

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again"
# Commands that call preemption.raise_on_sigterm; others leave SIGTERM to the system.
RESUMABLE = (
    "ablate", "build_tokens", "checkpoint", "continued", "convert", "embed", "pretrain",
    "quickstart", "store", "train",
)  # fmt: skip

PARENT = "DGPT_JAX_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_TOOLS = os.path.join(os.path.dirname(_PACKAGE), "tools")
_DIRECTORIES = (
    _PACKAGE, os.path.join(_PACKAGE, "commands"), os.path.join(_PACKAGE, "examples"),
    _TOOLS, os.path.join(_TOOLS, "studies"), os.path.join(_TOOLS, "benchmarks"),
)  # fmt: skip


def _exit(number, _):
    os._exit(130 if number == signal.SIGINT else EXIT_PREEMPTED)


def install(name: str):
    """Installs the handlers for the command whose module is called `name`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    if name in RESUMABLE and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def _install_for_main():
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    directory, name = os.path.split(os.path.realpath(file))
    if directory in _DIRECTORIES:
        install(name.removesuffix(".py"))


def _end_with_parent():
    parent = os.environ.pop(PARENT, "")
    if parent and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != parent:  # it has ended before
            os.kill(os.getpid(), signal.SIGTERM)


def restore_sigint():
    """Makes Ctrl-C raise KeyboardInterrupt again; SIGTERM stays as it is."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_install_for_main()
_end_with_parent()
