"""SIGTERM and Ctrl-C end a command after it has saved its work."""

from dgpt_jax.distributed.early_signals import EXIT_PREEMPTED

import os
import signal
from types import FrameType

from jax.experimental import multihost_utils

from dgpt_jax.distributed import multihost


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM in a resumable command."""


def raise_on_sigterm():
    """Makes SIGTERM raise Terminated. Without it, JAX swallows the signal in multi-process runs,
    and a single process exits without clean-up."""

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


class StopOnSignal:
    """Context in which SIGTERM and SIGINT set `exit_code` instead of ending the process.

    The training loop calls `should_stop` between steps and saves before it returns; a second SIGINT
    exits at once. In multi-process runs SIGTERM is left to JAX, which stops all processes after the
    same step, and SIGINT is sent on as SIGTERM: an exception in one process would leave the others
    waiting, or be lost in a callback.
    """

    def __init__(self):
        self.exit_code: int | None = None
        self._interrupted = False
        self._previous = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (
            (signal.SIGINT,) if multihost.is_multiprocess() else (signal.SIGINT, signal.SIGTERM)
        ):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """True if the run stops before `step`, in all processes. Each must call it every step."""
        if multihost.is_multiprocess() and multihost_utils.reached_preemption_sync_point(step):
            self.exit_code = 130 if self._interrupted else EXIT_PREEMPTED
        return self.exit_code is not None

    def _receive(self, number: int, _: FrameType | None):
        if number == signal.SIGINT and (self._interrupted or self.exit_code is not None):
            os._exit(130)
        self._interrupted = number == signal.SIGINT
        if multihost.is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.exit_code = 130 if self._interrupted else EXIT_PREEMPTED
