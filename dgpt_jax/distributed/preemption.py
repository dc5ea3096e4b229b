"""Signals: SIGTERM and Ctrl-C end a command after it has kept what it has done."""

from dgpt_jax.starting import EXIT_PREEMPTED

import os
import signal

from jax.experimental import multihost_utils

from dgpt_jax import hosts


class Terminated(KeyboardInterrupt):
    """SIGTERM, in a command that keeps what it has done and is run again."""


def raise_on_sigterm():
    """SIGTERM raises Terminated; without it, JAX swallows the signal in one of several processes,
    and nothing is cleaned up in a single one."""

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


class StopOnSignal:
    """Within it, SIGTERM and SIGINT set `exit_code` instead of ending the process.

    The loop asks between steps, saves, and leaves; a second SIGINT leaves at once. One of several
    processes leaves SIGTERM to JAX, which makes all of them stop after the same step, and turns
    SIGINT into it: an exception in one would leave the others waiting, or be lost in a callback.
    """

    def __init__(self):
        self.exit_code = None
        self._interrupted = False
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGINT,) if hosts.together() else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop before `step`; every process asks for every step and hears the same."""
        if hosts.together() and multihost_utils.reached_preemption_sync_point(step):
            self.exit_code = 130 if self._interrupted else EXIT_PREEMPTED
        return self.exit_code is not None

    def _receive(self, number, _):
        if number == signal.SIGINT and (self._interrupted or self.exit_code is not None):
            os._exit(130)
        self._interrupted = number == signal.SIGINT
        if hosts.together():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.exit_code = 130 if self._interrupted else EXIT_PREEMPTED
