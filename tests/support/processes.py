"""Python processes with virtual CPU devices, which must be chosen before JAX starts."""

import os
import subprocess
import sys

from tests.support.paths import ROOT

# Tests compile a lot and compute little: a quarter of the time, same losses.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if os.environ.get("FULL_COMPILE"):  # as for users: the weekly workflow
    QUICK_COMPILE = ""


def start(words, *, devices: int = 1, **environment) -> subprocess.Popen:
    """Starts `python WORDS…` in the repository, stdout and stderr in one pipe."""
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | settings | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def outputs_of(processes, timeout: float | None = None) -> list[str]:
    """Outputs of processes that exit within `timeout` seconds, else TimeoutExpired; kills them."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def on_devices(count: int, function, *args, timeout: float | None = None, **environment):
    """Calls a function of a test module in a process with `count` devices, and checks its exit."""
    call = f"import {function.__module__} as tests; tests.{function.__name__}(*{args!r})"
    process = start(["-c", call], devices=count, **environment)
    (output,) = outputs_of([process], timeout)
    print(output)
    assert process.returncode == 0, output[-2000:]
