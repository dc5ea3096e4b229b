"""What an evaluation on frozen features will need on TPUs that are not there.

The search of kNN, or the fit of the linear probe, is compiled as `plan.py` compiles a training
step. Features of both splits, of all kinds (config.features), are on the chips at the same time.
The encoder is not counted: it is done before the first fit.
"""

import math
import time
from dataclasses import dataclass

import jax
import numpy as np

from dgpt_jax import config, plan, sharding
from dgpt_jax.chips import GIB, Topology
from dgpt_jax.config import Evaluate
from dgpt_jax.evals import features, knn, probe
from dgpt_jax.schema import UserError


@dataclass(frozen=True)
class Sizes:
    """Of the data, by default ImageNet-1K's, and of a feature."""

    width: int
    examples: int = 1_281_167
    test_examples: int = 50_000
    classes: int = 1000


@dataclass(frozen=True)
class EvalPlan:
    """A protocol on a topology; bytes of one chip."""

    topology: Topology
    bank_bytes: float  # features
    temporary_bytes: float  # with labels and results
    code_bytes: float
    compile_seconds: float

    @property
    def peak_bytes(self) -> float:
        return self.bank_bytes + self.temporary_bytes + self.code_bytes

    def report(self) -> dict:
        """Plain numbers for JSON."""
        return {
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "fits": True,
            "hbm_bytes": {
                "features": self.bank_bytes, "temporaries": self.temporary_bytes,
                "code": self.code_bytes, "sum": self.peak_bytes,
                "available": self.topology.chip.hbm,
            },
            "compile_seconds": self.compile_seconds,
            "libtpu": plan.libtpu_version(),
        }  # fmt: skip

    def __str__(self) -> str:
        hbm = {name: f"{size / GIB:.2f}" for name, size in self.report()["hbm_bytes"].items()}
        return (
            f"{self.topology}\n  fits: {hbm['sum']} of {hbm['available']} GiB per chip: features "
            f"{hbm['features']}, temporaries {hbm['temporaries']}, code {hbm['code']}\n  compiled "
            f"in {self.compile_seconds:.0f} s by libtpu {plan.libtpu_version()}"
        )


def plan_evaluation(settings: Evaluate, sizes: Sizes, topology: Topology) -> EvalPlan:
    """Compiles the search or fit of a protocol. Raises plan.DoesNotFit, or UserError."""
    if settings.protocol == "robustness":
        raise UserError("robustness keeps no features: there is nothing to plan for it")
    mesh = sharding.make_mesh(config.Mesh(), plan.devices_of(topology))
    sharding.process_rows(mesh, settings.batch_size, process=0)  # says so where it cannot be split
    batch_size, width = settings.batch_size, sizes.width
    lengths = [min(n, settings.most or n) for n in (sizes.examples, sizes.test_examples)]
    train, test = (_rows(length, batch_size, width, mesh) for length in lengths)
    banks = len(settings.features) * (plan.sharded_bytes(train) + plan.sharded_bytes(test))
    rows = train
    if settings.protocol != "knn" and 0 not in settings.shots:  # they are a bank of their own
        rows = _rows(max(settings.shots) * sizes.classes, batch_size, width, mesh)
        banks += plan.sharded_bytes(rows)
    began = time.monotonic()
    temporary_bytes, code_bytes = 0.0, 0.0
    if settings.protocol != "fewshot":  # which is solved on the hosts
        lowered = _search(settings, rows) if settings.protocol == "knn" else _fit(sizes, rows)
        memory = plan.compile_for(lowered, topology).memory_analysis()
        temporary_bytes = memory.peak_memory_in_bytes - plan.sharded_bytes(rows)
        code_bytes = memory.generated_code_size_in_bytes
    seconds = time.monotonic() - began
    made = EvalPlan(topology, banks, temporary_bytes, code_bytes, seconds)
    if made.peak_bytes > topology.chip.hbm:
        raise plan.DoesNotFit(made.peak_bytes, topology.chip.hbm)
    return made


def _rows(length: int, batch_size: int, width: int, mesh) -> jax.ShapeDtypeStruct:
    shape = features.bank_steps(length, batch_size, mesh), batch_size, width
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding.microbatch_sharding(mesh))


def _beside(rows) -> jax.ShapeDtypeStruct:
    """Labels or folds of rows."""
    return jax.ShapeDtypeStruct(rows.shape[:2], np.int32, sharding=rows.sharding)


def _search(settings: Evaluate, rows):
    mesh = rows.sharding.mesh
    everywhere = sharding.replicated(mesh)
    queries = jax.ShapeDtypeStruct(rows.shape[1:], np.float32, sharding=everywhere)
    most = min(max(settings.k), math.prod(rows.shape[:2]))
    return knn.nearest.lower(queries, (rows, _beside(rows)), most, mesh)


def _fit(sizes: Sizes, rows):
    mesh = rows.sharding.mesh
    width, everywhere = rows.shape[-1], sharding.replicated(mesh)
    scale = (jax.ShapeDtypeStruct((width,), np.float32, sharding=everywhere),) * 2
    problem = rows, _beside(rows), _beside(rows)
    return probe.fit.lower(problem, scale, 0, 1.0, 1, classes=sizes.classes, mesh=mesh)


def advice(settings: Evaluate) -> str:
    """What to change where it does not fit."""
    if len(settings.features) > 1:
        name = settings.features[0]
        return f"try --config.features={name}, one kind at a time, or more chips"
    return "take more or larger chips"
