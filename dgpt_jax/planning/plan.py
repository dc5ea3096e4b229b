"""Memory and cost of a training step on absent TPUs.

libtpu compiles the actual step ahead of time for a topology, on any machine, and hlo_costs.py
analyzes the program: memory, HBM traffic, collectives. Times are lower bounds from data sheets: of
arithmetic, memory traffic or collectives alone.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dgpt_jax.config import TrainConfig, durations
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics
from dgpt_jax.planning import hlo, hlo_costs
from dgpt_jax.planning.chips import GIB, Topology
from dgpt_jax.training import optimizer, tasks, train_step

# Stop libtpu from querying the metadata server and from locking a TPU.
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of the time of a step in seconds, each from one peak rate."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The largest bound."""
        return max(dataclasses.astuple(self))

    @property
    def binding(self) -> str:
        """Name of the largest bound."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Plan:
    """A training step on a topology. Bytes and FLOPs are per chip, unless noted."""

    topology: Topology
    mesh: dict[str, int]
    batch_size: int  # global
    params_bytes: float
    optimizer_bytes: float
    batch_bytes: float
    peak_bytes: float  # with arguments and results; the compiler compares it with the HBM
    code_bytes: float
    model_flops: float  # per image, by flops.FORMULA
    compiled_flops: float
    moved_bytes: float
    collectives: tuple[hlo_costs.Collective, ...]
    steps: int | None
    compile_seconds: float

    @property
    def temporary_bytes(self) -> float:
        """Activations, gradients, and other memory that is neither state nor batch."""
        return self.peak_bytes - self.params_bytes - self.optimizer_bytes - self.batch_bytes

    @property
    def images(self) -> float:
        """Images per chip and step."""
        return self.batch_size / self.topology.chips

    @property
    def bounds(self) -> Bounds:
        """Lower bounds of the time of a step."""
        chip = self.topology.chip
        return Bounds(
            compute=self.images * self.model_flops / chip.flops,
            memory=self.moved_bytes / chip.hbm_rate,
            ici=sum(c.wire_bytes for c in self.collectives if not c.dcn) / chip.ici,
            dcn=sum(c.wire_bytes for c in self.collectives if c.dcn) / chip.dcn,
        )

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization at the bound."""
        return self.bounds.compute / self.bounds.seconds

    @property
    def chip_hours(self) -> float | None:
        """Chip-hours of the whole training at the bound; None if `steps` is unknown."""
        return self.steps and self.steps * self.bounds.seconds * self.topology.chips / 3600

    def largest_batch(self) -> int:
        """Estimated number of images per chip and step that would fit with the same number of
        micro-batches, if temporaries beyond one copy of the gradients grow with the images."""
        fixed = 2 * self.params_bytes + self.optimizer_bytes + self.code_bytes
        bytes_per_image = (self.peak_bytes - fixed) / self.images
        return max(int(self.images), int((self.topology.chip.hbm - fixed) / bytes_per_image))


class DoesNotFit(Exception):
    """Raised for a program that needs more memory than a chip has; `needed` in bytes."""

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed / GIB:.1f} of {available / GIB:.2f} GiB per chip")
        self.needed, self.available = needed, available


def libtpu_version() -> str:
    """Returns the version of libtpu. Raises UserError if it is not installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("libtpu is not installed: pip install 'dgpt_jax[plan]'") from None


def devices_of(topology: Topology) -> list[Any]:
    """Returns descriptions of the chips of a topology, for which JAX compiles like for devices.

    Raises UserError if libtpu is missing or rejects the topology.
    """
    from jax.experimental import topologies

    libtpu_version()
    os.environ.update(OFFLINE)
    shape = "x".join(map(str, topology.shape))
    options: dict[str, Any] = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        description = topologies.get_topology_desc(
            f"{topology.chip.name}:{shape}", "tpu", **options
        )
    except Exception as e:  # various classes of libtpu
        raise UserError(f"{topology}: {str(e).splitlines()[0]}") from None
    return list(description.devices)


def plan_training(config: TrainConfig, topology: Topology) -> Plan:
    """Compiles the training step of a config for a topology. Raises DoesNotFit or UserError."""
    mesh = sharding.make_mesh(config.mesh, devices_of(topology))
    sharding.process_rows(mesh, config.batch_size, process=0)  # UserError if not divisible
    task = tasks.task_without_data(config)
    start = time.monotonic()
    lowered, abstract_state, batch = lower(config, task, mesh)
    compiled = compile_for(lowered, topology)
    seconds = time.monotonic() - start
    program = hlo.Program(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    plan = Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        params_bytes=sharded_bytes(abstract_state.params),
        optimizer_bytes=sharded_bytes(abstract_state.opt_state),
        batch_bytes=sharded_bytes(batch),
        peak_bytes=memory.peak_memory_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        model_flops=task.model_flops(),
        compiled_flops=hlo_costs.flops(program),
        moved_bytes=hlo_costs.bytes_moved(program),
        collectives=tuple(hlo_costs.collectives(program)),
        steps=steps_of(config),
        compile_seconds=seconds,
    )
    if plan.peak_bytes > topology.chip.hbm:
        raise DoesNotFit(plan.peak_bytes, topology.chip.hbm)
    return plan


def compile_for(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
    """Returns the compiled program. Raises DoesNotFit if the compiler runs out of HBM."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        sizes = re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", str(e))
        if not sizes:
            raise
        raise DoesNotFit(_parse_bytes(sizes[1]), topology.chip.hbm) from None


def lower(
    config: TrainConfig, task: Any, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, train_step.TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """Returns (lowered step, abstract state, abstract batch) of a config on a mesh."""
    # The numbers of the schedule do not change the program.
    tx = task.optimizer(optimizer.schedule(1.0, 1, 2), 1)
    abstract_state = train_step.abstract_state(task.init, tx, mesh)

    def abstract(x, leading, sharding):
        return jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding)

    by_rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    batch = {
        name: abstract(x, (config.batch_size,), by_rows)
        for name, x in task.abstract_example().items()
    }
    running = jax.eval_shape(metrics.averages(task.metric_names).empty)
    running, frozen = jax.tree.map(lambda x: abstract(x, (), replicated), (running, task.frozen))
    step = train_step.make_train_step(
        task.loss, tx, mesh, accum_steps=config.accum_steps, prepare=task.prepare, seed=config.seed
    )
    return step.lower(abstract_state, running, batch, frozen), abstract_state, batch


def steps_of(config: TrainConfig) -> int | None:
    """Returns the steps of the whole training; None if they depend on an unknown number of
    examples."""
    if config.data.examples is None and "epoch" in config.total:
        return None
    examples = config.data.examples or 0
    return durations.steps(
        config.total, "config.total", batch_size=config.batch_size, examples=examples, least=1
    )


def sharded_bytes(tree: Any) -> float:
    """Returns the bytes per device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def _parse_bytes(text: str) -> float:
    """Parses "1.5G"."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1], 1)
    return float(text.rstrip("KMGT")) * scale
