"""Checks of a machine for training. Each returns findings: ok, warn or fail, with a remedy."""

import importlib.metadata
import os
import platform
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import psutil
from etils import epath
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dgpt_jax import invocation
from dgpt_jax.config import HostsConfig
from dgpt_jax.data import token_store
from dgpt_jax.distributed import multihost
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import disk_space, gcs, tfds_dataset

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Optional packages of jax for its devices.
JAX_PACKAGES = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")
CUDA12_DRIVER = 525  # the oldest supported Linux driver: docs.nvidia.com, CUDA compatibility
MIN_RAM, MIN_DISK = 4e9, 20e9  # free bytes that a small run needs


@dataclass(frozen=True)
class Finding:
    """Result of a check: level "ok", "warn" (training may work) or "fail", and a remedy."""

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:5} {self.text}" + f": {self.remedy}" * bool(self.remedy)


def packages(constraints: Path = CONSTRAINTS) -> list[Finding]:
    """Checks installed versions against setup.py and the tested versions in `constraints`."""
    try:
        required = importlib.metadata.requires("dgpt_jax") or []
    except importlib.metadata.PackageNotFoundError:
        remedy = f"{invocation.installation('tpu')}, or cuda"
        return [Finding("fail", "dgpt_jax is not installed", remedy)]
    tested = _tested_versions(constraints)
    requirements = [r for r in map(Requirement, required) if r.marker is None]
    requirements += [Requirement(name) for name in JAX_PACKAGES if _version(name)]
    checked = [
        check_version(r, _version(r.name), tested.get(canonicalize_name(r.name)))
        for r in requirements
    ]
    problems = [finding for finding in checked if finding.level != "ok"]
    counts = f"{len(checked) - len(problems)} of {len(checked)} packages"
    source = "as tested" if tested else "allowed by setup.py (no constraints.txt)"
    text = f"Python {platform.python_version()}, jax {_version('jax')}, {counts} {source}"
    return [Finding("ok", text), *problems]


def check_version(required: Requirement, installed: str | None, tested: str | None) -> Finding:
    """Checks the version of a package against its requirement and the tested version."""
    remedy = "tools/setup_venv.sh with your extras, or pip install -c constraints.txt"
    if not invocation.IN_CLONE:
        remedy = f"pip install '{required.name}{required.specifier}'"
    if installed is None:
        return Finding("fail", f"{required.name} is not installed", remedy)
    if not required.specifier.contains(installed, prereleases=True):
        return Finding("fail", f"{required.name} {installed} is not {required.specifier}", remedy)
    if tested not in (None, installed):
        return Finding("warn", f"{required.name} {installed}, tested with {tested}", remedy)
    return Finding("ok", f"{required.name} {installed}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested_versions(constraints: Path) -> dict[str, str]:
    """{canonical name: version} of the lines that apply to this Python."""
    if not constraints.exists():
        return {}
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    pinned = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(r.name): next(iter(r.specifier)).version
        for r in pinned
        if r.marker is None or r.marker.evaluate()
    }


def accelerators(root: Path = Path("/")) -> list[Finding]:
    """Checks device files and drivers against the packages that JAX needs for them."""
    findings = []
    if list(root.glob("dev/accel[0-9]*")) and not _version("libtpu"):
        remedy = invocation.installation("tpu")
        findings.append(Finding("fail", "a TPU, but no libtpu", remedy))
    if list(root.glob("dev/nvidia[0-9]*")) and not _version("jax-cuda12-plugin"):
        remedy = invocation.installation("cuda")
        findings.append(Finding("fail", "a GPU, but no CUDA for JAX", remedy))
    driver = root / "proc/driver/nvidia/version"
    version = re.search(r"(\d+)\.\d+", driver.read_text()) if driver.exists() else None
    if version:
        old = int(version[1]) < CUDA12_DRIVER
        remedy = f"CUDA 12 needs {CUDA12_DRIVER} or newer" if old else ""
        findings.append(Finding("fail" if old else "ok", f"NVIDIA driver {version[0]}", remedy))
    return findings


def devices(config: HostsConfig, requested: str) -> list[Finding]:
    """Checks the devices of JAX on platform `requested` ("": JAX's default), after joining the
    other processes, if any, like training."""
    try:
        multihost.start(config, requested)
    except UserError as e:
        return [Finding("fail", str(e))]
    local = jax.local_devices()
    processes = counted(jax.process_count(), "process", "processes")
    text = f"{jax.device_count()} × {local[0].device_kind} in {processes}"
    stats = [device.memory_stats() or {} for device in local]
    if limits := [s["bytes_limit"] for s in stats if "bytes_limit" in s]:
        text += f", {min(limits) / 2**30:.1f} GiB each on this host"
    if local[0].platform == "cpu" and requested != "cpu":
        limit = os.environ.get("JAX_PLATFORMS")
        reason = f"JAX_PLATFORMS={limit} is set" if limit else "--platform=tpu or gpu shows why"
        return [Finding("warn", text, f"no accelerator; {reason}")]
    return [Finding("ok", text)]


def memory() -> list[Finding]:
    """Checks cores and free RAM of the host."""
    ram = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {ram.total / 1e9:.1f} GB of RAM, {ram.available / 1e9:.1f} GB free"
    low = ram.available < MIN_RAM
    return [Finding("warn", text, "stop other programs") if low else Finding("ok", text)]


def data(path: str) -> list[Finding]:
    """Checks a token store or image dataset: opens it like training and, if it is local, reads an
    example of each split."""
    try:
        gcs.require(path)
        token_store.require_finished(path)
        opened = tfds_dataset.Opened(path)
        info = opened.builder.info
        if stored := token_store.exists(path):
            features: Any = info.features  # a FeaturesDict
            token_store.check_features(path, features)
        splits = [tfds_dataset.Split(path, name, opened) for name in info.splits]
        if opened.cache is None:
            for split in splits:
                split[0]
                split.close()
        size = f"{sum(opened.sizes.values()) / 1e9:.2f} GB"
        if stored:
            store = token_store.StoreInfo.load(path)
            store.teacher.load_codec(path)
            teacher = store.teacher
            name = teacher.weights.get("name", "a teacher without a name")
            tokens = f"{teacher.codec}, {teacher.tokens} × {teacher.width} of {name}"
            counts = f"{counted(len(splits), 'view')} of {counted(len(splits[0]), 'example')}"
            return [Finding("ok", f"{path}: token store, {counts}, {tokens}, {size}")]
    except UserError as e:
        return [Finding("fail", str(e))]
    counts = ", ".join(f"{split.split} {len(split)}" for split in splits)
    label = splits[0].label
    classes = counted(label.num_classes, "class", "classes") if label else "no labels"
    return [Finding("ok", f"{path}: images, {counts}, {classes}, {size}")]


def workdir(path: str) -> list[Finding]:
    """Checks that files can be written to and read from `path`, and the free disk space."""
    try:
        gcs.require(path)
        directory = epath.Path(path)
        created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe_{secrets.token_hex(8)}"
        probe.write_text("probe")
        same = probe.read_text() == "probe"
        probe.unlink()
        free = disk_space.free_bytes(path)
        if created and free is not None:
            directory.rmdir()
    except UserError as e:
        return [Finding("fail", str(e))]
    except OSError as e:
        text = f"{path} cannot be written to ({e.strerror or e})"
        return [Finding("fail", text, "choose another --workdir")]
    if not same:
        return [Finding("fail", f"{path} returns other bytes than were written")]
    space = "" if free is None else f", {disk_space.size(free)} free"
    if free is not None and free < MIN_DISK:
        return [Finding("warn", f"{path} is writable{space}", "free space for checkpoints")]
    return [Finding("ok", f"{path} is writable{space}")]
