"""Environment of a process: accelerators of its host, and launchers that started it with others."""

import glob
import importlib.util
import os

import jax

from dgpt_jax.errors import UserError


def local_accelerator() -> str:
    """Returns "a TPU" or "a GPU" if the host has its device files, unless JAX is limited to the
    CPU, and "" otherwise."""
    # JAX adds the attribute at run time.
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if "cpu" in (platforms or ""):
        return ""
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if tpus and importlib.util.find_spec("libtpu"):
        return "a TPU"
    return "a GPU" if glob.glob("/dev/nvidia[0-9]*") else ""


def started_several(platform: str) -> bool:
    """True if a launcher that JAX supports started several processes, by the environment.

    On a Cloud TPU VM, whose environment does not say, also true for one process: there JAX queries
    the metadata server, which answers at once. Raises UserError in a Kubernetes Job without the
    package kubernetes.
    """
    env = os.environ
    if any(int(env.get(n, 1)) > 1 for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if platform in ("", "tpu") and local_accelerator() == "a TPU":
        workers = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
        if workers is not None:  # Google Kubernetes Engine, or a single host
            return "," in workers or int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1
        return "TPU_SKIP_MDS_QUERY" not in env
    indexed_job = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    if indexed_job and not importlib.util.find_spec("kubernetes"):
        raise UserError(
            "in a pod of a Kubernetes Job, JAX needs the package kubernetes to find the other "
            "processes: pip install 'jax[k8s]', or set config.hosts.coordinator, num_processes and "
            "process_id (config.hosts.num_processes=1 for a single process)"
        )
    return indexed_job


def owns_all_gpus() -> bool:
    """True if a Slurm or Open MPI task is alone on its host, or sees only the GPU assigned to it.

    By default JAX takes the one GPU numbered by the task's local rank, even if a task that is alone
    has eight of them, or sees no GPU of that number.
    """
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", "")
    alone = tasks == env.get("SLURM_STEP_NUM_NODES") or env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    one_visible = visible != "" and "," not in visible
    return (alone or one_visible) and "JAX_LOCAL_DEVICE_IDS" not in env
