"""Multi-process runs: joining processes, checking them before any work, ending them together."""

import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from etils import epath
from jax.experimental import multihost_utils

from dgpt_jax.config import HostsConfig
from dgpt_jax.distributed import launchers
from dgpt_jax.errors import UserError

HEARTBEAT_SECONDS = 30  # a process silent for this long counts as dead, which ends all others
ABORT_GRACE_SECONDS = 5  # for other processes to print their errors before the coordinator exits
NAME_BYTES = 64


def _distributed_state() -> Any:
    """Returns JAX's internal record of the coordinator, its client, process_id and num_processes.

    The public API has process_index and process_count, which start a backend, and no client.
    """
    from jax._src.distributed import global_state

    return global_state


def start(config: HostsConfig, platform: str):
    """Joins the other processes, if any, and selects the platform ("": JAX's default).

    Raises UserError if processes are missing or the platform is unavailable.
    """
    if platform:
        jax.config.update("jax_platforms", "cuda" if platform == "gpu" else platform)
    if config.coordinator:
        if config.num_processes is None or config.process_id is None:
            raise UserError(
                "config.hosts.coordinator needs hosts.num_processes and hosts.process_id too"
            )
        _join(config, config.coordinator, config.num_processes, config.process_id)
    elif config.num_processes != 1 and launchers.started_several(platform):
        _join(config)
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0] or "JAX has no plugin for it"  # a bare assert in JAX
        if not platform:
            raise UserError(no_device(reason)) from None
        raise UserError(f"config.platform={platform} is not available: {reason}") from None
    if platform and backend != platform:
        raise UserError(f"config.platform={platform}, but JAX found {backend}")
    if not platform and backend == "cpu" and launchers.local_accelerator():
        raise UserError(
            f"this machine has {launchers.local_accelerator()}, but JAX found only the CPU: "
            f"another process may hold it, or its package is missing (config.platform=cpu runs on "
            f"the CPU)"
        )
    if config.num_processes is not None and config.num_processes != jax.process_count():
        raise UserError(
            f"config.hosts.num_processes is {config.num_processes}, JAX found "
            f"{jax.process_count()}: start that many with srun, mpirun or a JobSet, or set "
            f"hosts.coordinator and hosts.process_id"
        )


def no_device(reason: str) -> str:
    """Returns the error for JAX finding no device, which names JAX_PLATFORMS if it is set."""
    platforms = os.environ.get("JAX_PLATFORMS")
    limit = f" among JAX_PLATFORMS={platforms}: unset that variable" if platforms else ""
    return f"JAX finds no device{limit} ({reason})"


def _join(config: HostsConfig, *address: Any):
    """Calls jax.distributed.initialize; without `address`, JAX gets it from the launcher.

    JAX's own timeout aborts with a C++ stack trace, so a timer of ours fires first.
    """
    timer = threading.Timer(config.timeout, _join_timed_out, (config.timeout,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *address,
            initialization_timeout=config.timeout + HEARTBEAT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as e:  # of metadata servers and the Kubernetes API
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"could not join the other processes: {reason} (set config.hosts.coordinator, "
            f"num_processes and process_id, or config.hosts.num_processes=1 for one process)"
        ) from None
    finally:
        timer.cancel()
    if launchers.owns_all_gpus():
        jax.config.update("jax_cuda_visible_devices", "all")


def _join_timed_out(timeout: int):
    """Exits with an error that has the number of connected processes, known to process 0 only."""
    state = _distributed_state()
    address = state.coordinator_address
    port = address.rpartition(":")[2] if address else ""
    if port and state.process_id == 0:
        connected = sum(
            c.laddr.port == int(port) and c.status == psutil.CONN_ESTABLISHED
            for c in psutil.Process().net_connections(kind="tcp")
        )
        text = f"{connected} of {state.num_processes} processes connected to {address}"
    else:
        time.sleep(ABORT_GRACE_SECONDS)  # process 0 counts those that wait
        text = f"the processes did not connect{f' to {address}' if address else ''}"
    print(
        f"error: {text} within {timeout} s (config.hosts.timeout): start the command on every "
        f"host, and open {f'port {port}' if port else 'the port of JAX'} between them "
        f"(JAX_COORDINATOR_PORT sets another; Google Cloud opens 8476 between TPU hosts)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def is_multiprocess() -> bool:
    """True in a multi-process run. Starts no backend, so it works after one has failed to start."""
    return jax.distributed.is_initialized() and _distributed_state().num_processes > 1


def is_main_process() -> bool:
    """True in process 0. Starts no backend, unlike jax.process_index."""
    return _distributed_state().process_id == 0


def preflight(workdir: epath.Path | Path | str, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns the lines of a table of all processes, after checking that they share `workdir`.

    Raises UserError, in every process, with the hosts that cannot see a file of the first one.
    """
    name = np.zeros(NAME_BYTES, np.uint8)
    encoded = socket.gethostname().encode()[:NAME_BYTES]
    name[: len(encoded)] = list(encoded)
    names = [bytes(row).rstrip(b"\0").decode() for row in _allgather(name)]
    if jax.process_count() > 1:
        visible = _allgather(_sees_probe(epath.Path(workdir)))
        blind = [name for name, sees in zip(names, visible, strict=True) if not sees]
        if blind:
            raise UserError(
                f"{', '.join(blind)} cannot see what {names[0]} writes to {workdir}: --workdir "
                f"must be a directory that all hosts share"
            )
    lines = ["process  host                      devices  of all"]
    for process, host in enumerate(names):
        devices = sum(d.process_index == process for d in jax.devices())
        lines.append(f"{process:7}  {host:24}  {devices:7}  {jax.device_count():6}")
    return [*lines, f"mesh {dict(mesh.shape)} on {mesh.devices.flat[0].device_kind}"]


def _allgather(value: np.ndarray) -> np.ndarray:
    """Returns the values of all processes, stacked."""
    gathered = multihost_utils.process_allgather(value)
    return np.reshape(gathered, (jax.process_count(), *np.shape(value)))


def _sees_probe(workdir: epath.Path) -> np.ndarray:
    """Returns whether this process sees a file that process 0 writes to `workdir`, which it
    creates."""
    number = np.array(secrets.randbits(31), np.int32)
    probe = workdir / f".probe_{int(multihost_utils.broadcast_one_to_all(number))}"
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
    multihost_utils.sync_global_devices("probe written")
    sees = np.array(probe.exists())
    multihost_utils.sync_global_devices("probe read")
    if jax.process_index() == 0:
        probe.unlink()
    return sees


def barrier(name: str):
    """Waits for all processes, up to 30 days. Uses no device, so they may do different things for
    hours before it. A process that dies ends the others."""
    if is_multiprocess():
        milliseconds = 30 * 24 * 3600 * 1000
        _distributed_state().client.wait_at_barrier(name, timeout_in_ms=milliseconds)


def abort(code: int):
    """Exits at once, which ends all other processes within a minute.

    Skips JAX's barrier at exit, where the processes would wait for each other. Process 0, the
    coordinator, exits last.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(ABORT_GRACE_SECONDS)
    os._exit(code)
