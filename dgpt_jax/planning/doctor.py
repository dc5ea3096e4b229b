"""Whether a machine is fit for training: findings, each ok, warn or fail, with the remedy."""

import errno
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import psutil
from etils import epath
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dgpt_jax import gcs, hosts, records, shards, token_store
from dgpt_jax.config import Hosts
from dgpt_jax.schema import UserError

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# What jax brings or is given for its devices; each is there or not.
JAX_PARTS = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")
CUDA12_DRIVER = 525  # the oldest Linux driver: docs.nvidia.com, CUDA compatibility
LEAST_RAM, LEAST_DISK = 4e9, 20e9  # free, in bytes: what even a small run takes


@dataclass(frozen=True)
class Finding:
    """One line: a level of ok, warn (it may go well) or fail, what was found, what to do."""

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:5} {self.text}" + f": {self.remedy}" * bool(self.remedy)


def packages(constraints: Path = CONSTRAINTS) -> list[Finding]:
    """Installed versions against what setup.py requires and what was tested."""
    try:
        required = importlib.metadata.requires("dgpt_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("fail", "dgpt_jax is not installed", "tools/setup_venv.sh tpu, or cuda")]
    tested = _tested(constraints)
    wanted = [r for r in map(Requirement, required) if r.marker is None]
    wanted += [Requirement(name) for name in JAX_PARTS if _version(name)]
    judged = [judge(r, _version(r.name), tested.get(canonicalize_name(r.name))) for r in wanted]
    odd = [finding for finding in judged if finding.level != "ok"]
    how = "as tested" if tested else "allowed by setup.py (constraints.txt is not there)"
    names = f"jax {_version('jax')}, {len(judged) - len(odd)} of {len(judged)} packages {how}"
    return [Finding("ok", f"Python {platform.python_version()}, {names}"), *odd]


def judge(required: Requirement, found: str | None, tested: str | None) -> Finding:
    """A package's version against its requirement and the tested one."""
    remedy = "tools/setup_venv.sh with your extras, or pip install -c constraints.txt"
    if found is None:
        return Finding("fail", f"{required.name} is not installed", remedy)
    if not required.specifier.contains(found, prereleases=True):
        return Finding("fail", f"{required.name} {found} is not {required.specifier}", remedy)
    if tested not in (None, found):
        return Finding("warn", f"{required.name} {found} was not tested, {tested} was", remedy)
    return Finding("ok", f"{required.name} {found}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested(constraints: Path) -> dict[str, str]:
    """{canonical name: version} of the lines that are for this Python."""
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
    """Device files and drivers, against the packages that JAX needs to use them."""
    found = []
    if list(root.glob("dev/accel[0-9]*")) and not _version("libtpu"):
        found.append(Finding("fail", "a TPU, but no libtpu", "tools/setup_venv.sh tpu"))
    if list(root.glob("dev/nvidia[0-9]*")) and not _version("jax-cuda12-plugin"):
        found.append(Finding("fail", "a GPU, but no CUDA for JAX", "tools/setup_venv.sh cuda"))
    driver = root / "proc/driver/nvidia/version"
    number = re.search(r"(\d+)\.\d+", driver.read_text()) if driver.exists() else None
    if number:
        old = int(number[1]) < CUDA12_DRIVER
        remedy = f"CUDA 12 needs {CUDA12_DRIVER} or newer" if old else ""
        found.append(Finding("fail" if old else "ok", f"NVIDIA driver {number[0]}", remedy))
    return found


def devices(config: Hosts, wanted: str) -> list[Finding]:
    """What JAX finds, after joining the other processes as training does, if there are any."""
    try:
        hosts.start(config, wanted)
    except UserError as e:
        return [Finding("fail", str(e))]
    mine = jax.local_devices()
    text = f"{jax.device_count()} × {mine[0].device_kind} in {jax.process_count()} process(es)"
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mine]
    if None not in limits:
        text += f", {min(limits) / 2**30:.1f} GiB each here"
    if mine[0].platform == "cpu" and wanted != "cpu":
        limit = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS={limit} limits JAX" if limit else "--platform=tpu or gpu says why"
        return [Finding("warn", text, f"no accelerator; {why}")]
    return [Finding("ok", text)]


def memory() -> list[Finding]:
    """Cores and RAM of the host."""
    ram = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {ram.total / 1e9:.1f} GB of RAM, {ram.available / 1e9:.1f} GB free"
    little = ram.available < LEAST_RAM
    return [Finding("warn", text, "end other programs") if little else Finding("ok", text)]


def data(path: str) -> list[Finding]:
    """A token store or an image dataset: opened as training does, one example of each split read
    where it is near."""
    try:
        gcs.require(path)
        token_store.refuse_unfinished(path)
        opened = records.Opened(path)
        info = opened.builder.info
        if stored := token_store.exists(path):
            token_store.refuse_others(path, info.features)
        splits = [records.Split(path, name, opened) for name in info.splits]
        if opened.cache is None:
            for split in splits:
                split[0]
                split.close()
        size = f"{sum(opened.sizes.values()) / 1e9:.2f} GB"
        if stored:
            store = token_store.StoreInfo.load(path)
            store.load_codec(path)
            teacher = store.teacher.get("name", "a teacher without a name")
            tokens = f"{store.codec}, {store.tokens} × {store.width} of {teacher}"
            counts = f"{len(splits)} view(s) of {len(splits[0])} examples"
            return [Finding("ok", f"{path}: token store, {counts}, {tokens}, {size}")]
    except UserError as e:
        return [Finding("fail", str(e))]
    counts = ", ".join(f"{split.split} {len(split)}" for split in splits)
    label = f"{splits[0].label.num_classes} classes" if splits[0].label else "no labels"
    return [Finding("ok", f"{path}: images, {counts}, {label}, {size}")]


def workdir(path: str) -> list[Finding]:
    """Whether a file can be written there and read again, and the disk's room."""
    try:
        gcs.require(path)
        place, made = epath.Path(path), not epath.Path(path).exists()
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".probe_{secrets.token_hex(8)}"
        probe.write_text("probe")
        same = probe.read_text() == "probe"
        probe.unlink()
        free = None if shards.is_remote(path) else shutil.disk_usage(path).free
        if made and free is not None:
            place.rmdir()
    except UserError as e:
        return [Finding("fail", str(e))]
    except OSError as e:
        return [
            Finding("fail", f"{path} cannot be written to ({e.strerror or e})", "mend --workdir")
        ]
    if not same:
        return [Finding("fail", f"{path} gives back other bytes than were written")]
    room = "" if free is None else f", {free / 1e9:.1f} GB free"
    if free is not None and free < LEAST_DISK:
        return [Finding("warn", f"{path} is writable{room}", "make room for checkpoints")]
    return [Finding("ok", f"{path} is writable{room}")]


def reach(address: str, processes: int, seconds: float) -> list[Finding]:
    """Whether the hosts of a run reach `HOST:PORT` of process 0. Called on all of them at about the
    same time: the one that it is listens for the `processes` - 1 others."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        return [Finding("fail", f"--coordinator is {address!r}", "write HOST:PORT")]
    try:
        with socket.socket() as mine:  # only a host's own address can be bound
            mine.bind((host, 0))
        server = socket.create_server(("", int(port)))
    except socket.gaierror:
        return [Finding("fail", f"{host} has no address", "write its number, or mend its name")]
    except OSError as e:
        if e.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return [Finding("fail", f"{address}: {e.strerror}", "choose another port")]
        return [_call(address, seconds)]
    with server:
        return [_listen(server, int(port), processes - 1, seconds)]


def _listen(server: socket.socket, port: int, others: int, seconds: float) -> Finding:
    until, came = time.monotonic() + seconds, []
    while len(came) < others and (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, peer = server.accept()
        except TimeoutError:
            break
        connection.close()
        came.append(peer[0])
    text = f"{len(came)} of {others} other hosts reached port {port} here within {seconds:.0f} s"
    if len(came) < others:
        came = ", ".join(came) or "nobody"
        return Finding("fail", f"{text} ({came})", _firewall(port))
    return Finding("ok", text)


def _call(address: str, seconds: float) -> Finding:
    host, _, port = address.rpartition(":")
    until, reason = time.monotonic() + seconds, "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            socket.create_connection((host, int(port)), timeout=left).close()
            return Finding("ok", f"{address} answers")
        except ConnectionRefusedError:
            reason = "nobody listens: run this on that host too, at the same time"
        except OSError as e:
            reason = f"{e.strerror or 'no answer'}: {_firewall(port)}"
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))
    return Finding("fail", f"{address} was not reached within {seconds:.0f} s", reason)


def _firewall(port) -> str:
    return f"let the firewall pass port {port} between the hosts (Google Cloud opens 8476)"
