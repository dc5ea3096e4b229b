"""What a training step will need on hardware that is not there.

The real step is compiled ahead of time for the real topology by libtpu, on any machine, and the
compiled program is read (costs.py): memory, bytes moved, collectives. Times are lower bounds, from
data sheets: no step can be faster than its arithmetic, its memory traffic or its collectives alone.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
import time
from dataclasses import dataclass

import jax
import numpy as np

from dgpt_jax import costs, durations, hlo, metrics, optim, sharding, state, tasks
from dgpt_jax.chips import GIB, Topology
from dgpt_jax.config import Train
from dgpt_jax.schema import UserError
from dgpt_jax.step import make_train_step

# libtpu looks for a TPU's machine and for other processes that hold it, unless told not to.
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of a step's time in seconds, each from one rate of the chip alone."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def binding(self) -> str:
        """The name of the longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Plan:
    """A step on a topology. Bytes and FLOPs are those of one chip, unless they say otherwise."""

    topology: Topology
    mesh: dict[str, int]
    batch_size: int  # of all chips together
    params_bytes: float
    optimizer_bytes: float
    batch_bytes: float
    peak_bytes: float  # with arguments and results, as the compiler compares it with the HBM
    code_bytes: float
    model_flops: float  # of an image, by flops.FORMULA
    compiled_flops: float
    moved_bytes: float
    collectives: tuple[costs.Collective, ...]
    steps: int | None
    compile_seconds: float

    @property
    def temporary_bytes(self) -> float:
        """Activations, gradients and whatever else is neither state nor batch."""
        return self.peak_bytes - self.params_bytes - self.optimizer_bytes - self.batch_bytes

    @property
    def images(self) -> float:
        """Images a chip and step."""
        return self.batch_size / self.topology.chips

    @property
    def bounds(self) -> Bounds:
        chip = self.topology.chip
        return Bounds(
            compute=self.images * self.model_flops / chip.flops,
            memory=self.moved_bytes / chip.hbm_rate,
            ici=sum(c.wire_bytes for c in self.collectives if not c.dcn) / chip.ici,
            dcn=sum(c.wire_bytes for c in self.collectives if c.dcn) / chip.dcn,
        )

    @property
    def mfu(self) -> float:
        """Model FLOPs over peak FLOPs, at the bound."""
        return self.bounds.compute / self.bounds.seconds

    @property
    def chip_hours(self) -> float | None:
        """Of the whole training, at the bound."""
        return self.steps and self.steps * self.bounds.seconds * self.topology.chips / 3600


class DoesNotFit(Exception):
    """The compiler refuses a step that needs more memory than the chip has; `needed` in bytes."""

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed / GIB:.1f} GiB a chip of {available / GIB:.2f}")
        self.needed, self.available = needed, available


def libtpu_version() -> str:
    """Raises UserError where libtpu is not installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("libtpu is not installed: pip install 'dgpt_jax[plan]'") from None


def devices_of(topology: Topology) -> list:
    """Descriptions of the chips of a topology, as good as devices for compiling."""
    from jax.experimental import topologies

    libtpu_version()
    os.environ.update(OFFLINE)
    shape = "x".join(map(str, topology.shape))
    options = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(f"{topology.chip.name}:{shape}", "tpu", **options)
    except Exception as e:  # libtpu's own kinds
        raise UserError(f"{topology}: {str(e).splitlines()[0]}") from None
    return list(found.devices)


def plan(run: Train, topology: Topology) -> Plan:
    """Compiles the step of a config for a topology. Raises DoesNotFit, or UserError."""
    mesh = sharding.make_mesh(run.mesh, devices_of(topology))
    sharding.process_rows(mesh, run.batch_size, process=0)  # says so where it cannot be split
    task = tasks.planned(run)
    began = time.monotonic()
    lowered, begun, batch = lower(run, task, mesh)
    compiled = compile_for(lowered, topology)
    seconds = time.monotonic() - began
    program = hlo.Program(compiled.as_text())
    memory = compiled.memory_analysis()
    made = Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        batch_size=run.batch_size,
        params_bytes=sharded_bytes(begun.params),
        optimizer_bytes=sharded_bytes(begun.opt_state),
        batch_bytes=sharded_bytes(batch),
        peak_bytes=memory.peak_memory_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        model_flops=task.model_flops(),
        compiled_flops=costs.flops(program),
        moved_bytes=costs.bytes_moved(program),
        collectives=tuple(costs.collectives(program)),
        steps=steps_of(run),
        compile_seconds=seconds,
    )
    if made.peak_bytes > topology.chip.hbm:
        raise DoesNotFit(made.peak_bytes, topology.chip.hbm)
    return made


def compile_for(lowered, topology: Topology):
    """The compiled program. Raises DoesNotFit where the compiler refuses it."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        sizes = re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", str(e))
        if not sizes:
            raise
        raise DoesNotFit(_bytes(sizes[1]), topology.chip.hbm) from None


def lower(run: Train, task, mesh):
    """(lowered step, abstract state, abstract batch) of a config on a mesh."""
    tx = task.optimizer(optim.schedule(1.0, 1, 2))  # its numbers change no program
    begun = state.abstract(task.init, tx, mesh)
    rows = sharding.batch_sharding(mesh)

    def placed(x, lead, place):
        return jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=place)

    batch = {
        name: placed(x, (run.batch_size,), rows) for name, x in task.abstract_example().items()
    }
    whole = sharding.replicated(mesh)
    running = jax.eval_shape(metrics.averages(task.metric_names).empty)
    running, frozen = jax.tree.map(lambda x: placed(x, (), whole), (running, task.frozen))
    step = make_train_step(
        task.loss, tx, mesh, accum_steps=run.accum_steps, prepare=task.prepare, seed=run.seed
    )
    return step.lower(begun, running, batch, frozen), begun, batch


def steps_of(run: Train) -> int | None:
    """Steps of the whole training, where the number of examples is known or does not matter."""
    if run.data.examples is None and "epoch" in run.total:
        return None
    examples = run.data.examples or 0
    return durations.steps(
        run.total, "config.total", batch_size=run.batch_size, examples=examples, least=1
    )


def changes_that_fit(run: Train, topology: Topology, say=print):
    """(change in words, its Plan) of the first change that makes a step fit, by compiling each:
    more micro-batches, parameters split, everything recomputed. None if none does."""
    chips_a_slice = topology.chips // topology.slices
    a_chip = run.batch_size // topology.chips
    split = dataclasses.replace(run.mesh, data=-1, fsdp=chips_a_slice // run.mesh.tensor)
    full = dataclasses.replace(run.model, remat="full")
    micro = [run.accum_steps * k for k in (2, 4, 8) if run.accum_steps * k <= a_chip]
    candidates = [{"accum_steps": k} for k in micro]
    candidates += [{"mesh": split}, *({"mesh": split, "accum_steps": k} for k in micro)]
    candidates += [{"model": full}, *({"model": full, "accum_steps": k} for k in micro)]
    candidates += [{"mesh": split, "model": full}]
    candidates += [{"mesh": split, "model": full, "accum_steps": k} for k in micro]
    for change in candidates:
        words = _in_words(change)
        try:
            return words, plan(dataclasses.replace(run, **change), topology)
        except DoesNotFit as e:
            say(f"tried {words}: {e}")
        except UserError as e:
            say(f"not possible: {words}: {e}")
    return None


def largest_batch(run: Train, made: Plan) -> int:
    """Images a chip and step that would fit, at the same number of micro-batches, estimated:
    temporaries beyond one copy of the gradients are taken to grow with the images."""
    fixed = 2 * made.params_bytes + made.optimizer_bytes + made.code_bytes
    each = (made.peak_bytes - fixed) / made.images
    return max(int(made.images), int((made.topology.chip.hbm - fixed) / each))


def _in_words(change: dict) -> str:
    """A change of config fields as flags."""
    words = []
    for name, value in change.items():
        if name == "mesh":
            words += ["--config.mesh.data=-1", f"--config.mesh.fsdp={value.fsdp}"]
        elif name == "model":
            words.append(f"--config.model.remat={value.remat}")
        else:
            words.append(f"--config.{name}={value}")
    return " ".join(words)


def sharded_bytes(tree) -> float:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def _bytes(text: str) -> float:
    """1.5G as bytes."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1], 1)
    return float(text.rstrip("KMGT")) * scale
