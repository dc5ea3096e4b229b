"""Many hosts as one program: joining them, checking them before any work, ending them together."""

import glob
import importlib.util
import os
import secrets
import socket
import sys
import threading
import time

import jax
import numpy as np
import psutil
from etils import epath
from jax._src.distributed import global_state  # nothing public says what a launcher told JAX
from jax.experimental import multihost_utils

from dgpt_jax.config import Hosts
from dgpt_jax.schema import UserError

HEARTBEAT_SECONDS = 30  # a host that is silent for so long is dead, and so are then all others
LAST_WORDS_SECONDS = 5  # for the others to say why they end, before the coordinator is gone
NAME_BYTES = 64


def start(config: Hosts, platform: str):
    """Joins the other processes, if there are any, and picks the platform ("" for what JAX finds).

    Raises UserError where processes are missing, or where the platform is not there.
    """
    if platform:
        jax.config.update("jax_platforms", "cuda" if platform == "gpu" else platform)
    if config.coordinator:
        if config.processes is None or config.process is None:
            raise UserError("config.hosts.coordinator needs hosts.processes and hosts.process too")
        _join(config, config.coordinator, config.processes, config.process)
    elif config.processes != 1 and _launched_together(platform):
        _join(config)
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0] or "JAX has no plugin for it"  # which it only asserts
        if not platform:
            raise UserError(no_device(reason)) from None
        raise UserError(f"config.platform={platform} is not available: {reason}") from None
    if platform and found != platform:
        raise UserError(f"config.platform={platform} was asked for, JAX found {found}")
    if not platform and found == "cpu" and _accelerators():
        raise UserError(
            f"this machine has {_accelerators()}, but JAX found only the CPU: another process may "
            f"hold it, or the package for it is missing (config.platform=cpu to go on without)"
        )
    if config.processes is not None and config.processes != jax.process_count():
        raise UserError(
            f"config.hosts.processes is {config.processes}, JAX found {jax.process_count()}: start "
            f"as many by srun, mpirun or a JobSet, or give hosts.coordinator and hosts.process"
        )


def no_device(reason: str) -> str:
    """A line about JAX's failure to find any device, which names JAX_PLATFORMS where that limits
    what it looks for."""
    name = os.environ.get("JAX_PLATFORMS")
    limit = f" among JAX_PLATFORMS={name}: unset that environment variable" if name else ""
    return f"JAX finds no device{limit} ({reason})"


def _join(config: Hosts, *address):
    """jax.distributed.initialize; without `address`, JAX asks the launcher for it.

    Its own time-out aborts the process with a stack of C++ calls, so ours comes first.
    """
    watch = threading.Timer(config.timeout, _did_not_meet, (config.timeout,))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            *address,
            initialization_timeout=config.timeout + HEARTBEAT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as e:  # whatever metadata servers and Kubernetes' API make of it
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"could not join the other processes: {reason} (config.hosts.coordinator, processes "
            f"and process say where they are; processes=1, that there are none)"
        ) from None
    finally:
        watch.cancel()
    if _owns_all_gpus():
        jax.config.update("jax_cuda_visible_devices", "all")


def _did_not_meet(timeout: int):
    """Ends this process with a line that says how many came, which only process 0 can know."""
    address = global_state.coordinator_address
    port = address.rpartition(":")[2] if address else ""
    if port and global_state.process_id == 0:
        came = sum(
            c.laddr.port == int(port) and c.status == psutil.CONN_ESTABLISHED
            for c in psutil.Process().net_connections(kind="tcp")
        )
        found = f"saw {came} of {global_state.num_processes} processes at {address}"
    else:
        time.sleep(LAST_WORDS_SECONDS)  # process 0 counts those that wait
        found = f"the processes did not meet{f' at {address}' if address else ''}"
    print(
        f"error: {found} within {timeout} s (config.hosts.timeout): start the command on every "
        f"host, and let the firewall pass {f'port {port}' if port else 'JAX'} between them "
        f"(JAX_COORDINATOR_PORT sets another port; Google Cloud opens 8476 between TPUs)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _launched_together(platform: str) -> bool:
    """Whether a launcher that JAX knows started several processes, as far as the environment tells.

    Only a Cloud TPU VM does not tell: there JAX asks the machine's metadata, which answer at once.
    """
    told = os.environ
    several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(told.get(name, 1)) > 1 for name in several):
        return True
    if platform in ("", "tpu") and _accelerators() == "a TPU":
        workers = told.get("TPU_PROCESS_ADDRESSES", told.get("TPU_WORKER_HOSTNAMES"))
        if workers is not None:  # Google Kubernetes Engine, or a machine that is alone
            return "," in workers or int(told.get("MEGASCALE_NUM_SLICES", 1)) > 1
        return "TPU_SKIP_MDS_QUERY" not in told
    indexed = "KUBERNETES_SERVICE_HOST" in told and "JOB_COMPLETION_INDEX" in told
    if indexed and not importlib.util.find_spec("kubernetes"):
        raise UserError(
            "this is a pod of a Kubernetes Job, and JAX needs the package kubernetes to find the "
            "others: pip install 'jax[k8s]', or set config.hosts.coordinator, processes and "
            "process (processes=1 if there are none)"
        )
    return indexed


def _owns_all_gpus() -> bool:
    """Whether a task of Slurm or Open MPI is alone on its host, or was given the one GPU it sees.

    JAX takes only the GPU of the task's number on its host, be there seven more or no such GPU.
    """
    told = os.environ
    tasks = told.get("SLURM_STEP_NUM_TASKS", "")
    alone = (
        tasks == told.get("SLURM_STEP_NUM_NODES") or told.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    visible = told.get("CUDA_VISIBLE_DEVICES", "")
    given_one = visible != "" and "," not in visible
    return (alone or given_one) and "JAX_LOCAL_DEVICE_IDS" not in told


def _platforms() -> str:
    return jax.config.jax_platforms or ""


def _accelerators() -> str:
    """What device files tell, unless JAX is told not to look beyond the CPU."""
    if "cpu" in _platforms():
        return ""
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if tpus and importlib.util.find_spec("libtpu"):
        return "a TPU"
    return "a GPU" if glob.glob("/dev/nvidia[0-9]*") else ""


def together() -> bool:
    """Whether this process is one of several. Starts no backend, so that it can be asked after one
    has failed."""
    return jax.distributed.is_initialized() and global_state.num_processes > 1


def preflight(workdir, mesh) -> list[str]:
    """Lines of a table of all processes, after checking that they share `workdir`.

    Raises UserError, on every host, with the hosts that do not see what the first one writes there.
    """
    name = np.zeros(NAME_BYTES, np.uint8)
    encoded = socket.gethostname().encode()[:NAME_BYTES]
    name[: len(encoded)] = list(encoded)
    names = [bytes(row).rstrip(b"\0").decode() for row in _everyones(name)]
    if jax.process_count() > 1:
        sees = _everyones(_sees_probe(epath.Path(workdir)))
        blind = [name for name, seen in zip(names, sees, strict=True) if not seen]
        if blind:
            raise UserError(
                f"{', '.join(blind)} cannot see what {names[0]} writes to {workdir}: --workdir "
                f"must be one directory that all hosts share"
            )
    lines = ["process  host                      devices  of all"]
    for process, host in enumerate(names):
        devices = sum(d.process_index == process for d in jax.devices())
        lines.append(f"{process:7}  {host:24}  {devices:7}  {jax.device_count():6}")
    return [*lines, f"mesh {dict(mesh.shape)} on {mesh.devices.flat[0].device_kind}"]


def _everyones(value: np.ndarray) -> np.ndarray:
    """The value of every process, stacked."""
    gathered = multihost_utils.process_allgather(value)
    return np.reshape(gathered, (jax.process_count(), *np.shape(value)))


def _sees_probe(workdir: epath.Path) -> np.ndarray:
    """Whether this process sees a file that process 0 writes into `workdir`, which it makes."""
    drawn = np.array(secrets.randbits(31), np.int32)
    probe = workdir / f".probe_{int(multihost_utils.broadcast_one_to_all(drawn))}"
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
    """Waits, for as long as it takes, until all processes are here. It uses no device: what they do
    in between may differ, and take hours. A process that dies ends the others."""
    if together():
        days = 30 * 24 * 3600 * 1000
        global_state.client.wait_at_barrier(name, timeout_in_ms=days)


def end(code: int):
    """Ends this process and with it, within a minute, all others: without the barrier at exit, in
    which it would wait for hosts that wait for it. Process 0, the coordinator, goes last."""
    sys.stdout.flush()
    sys.stderr.flush()
    if global_state.process_id == 0:
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(code)
