"""Starting JAX on the platform that was asked for, stopping on a signal."""

import os
import signal

import jax

from dgpt_jax.schema import UserError

# What a scheduler's signal ends with after saving: "try again", as sysexits has it.
EXIT_PREEMPTED = 75


def start(platform: str):
    """Picks the platform ("" for what JAX finds) and fails where it is not there."""
    if platform:
        jax.config.update("jax_platforms", "cuda" if platform == "gpu" else platform)
    try:
        found = jax.default_backend()
    except RuntimeError as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"config.platform={platform} is not available: {reason}") from None
    if platform and found != platform:
        raise UserError(f"config.platform={platform} was asked for, JAX found {found}")


class StopOnSignal:
    """Within it, SIGTERM and SIGINT set `exit_code` instead of ending the process.

    The loop looks at it between steps, saves, and leaves. A second SIGINT leaves at once.
    """

    def __init__(self):
        self.exit_code = None
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        if number == signal.SIGINT and self.exit_code is not None:
            os._exit(130)
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else 130
