"""Memory of an evaluation on frozen features on absent TPUs.

The kNN search or the fit of the linear probe is compiled ahead of time, like a training step in
plan.py. Features of both splits and of all kinds (config.features) are on the chips at the same
time. The encoder is not counted: it finishes before the first fit.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dgpt_jax.config import EvaluateConfig, roots
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_bank, knn, probe
from dgpt_jax.planning.chips import GIB, Topology
from dgpt_jax.planning.plan import (
    DoesNotFit,
    compile_for,
    devices_of,
    libtpu_version,
    sharded_bytes,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data (default: ImageNet-1K) and width of the features."""

    width: int
    examples: int = 1_281_167
    test_examples: int = 50_000
    classes: int = 1000


@dataclass(frozen=True)
class EvalPlan:
    """Memory of a protocol on a topology, in bytes per chip."""

    topology: Topology
    bank_bytes: float  # features
    temporary_bytes: float  # with labels and results
    code_bytes: float
    compile_seconds: float

    @property
    def peak_bytes(self) -> float:
        """Features, temporaries and code."""
        return self.bank_bytes + self.temporary_bytes + self.code_bytes

    def report(self) -> dict[str, Any]:
        """Returns the plan as plain numbers for JSON."""
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
            "libtpu": libtpu_version(),
        }  # fmt: skip

    def __str__(self) -> str:
        hbm = {name: f"{size / GIB:.2f}" for name, size in self.report()["hbm_bytes"].items()}
        return (
            f"{self.topology}\n  fits: {hbm['sum']} of {hbm['available']} GiB per chip: features "
            f"{hbm['features']}, temporaries {hbm['temporaries']}, code {hbm['code']}\n  compiled "
            f"in {self.compile_seconds:.0f} s by libtpu {libtpu_version()}"
        )


def plan_evaluation(config: EvaluateConfig, sizes: Sizes, topology: Topology) -> EvalPlan:
    """Compiles the search or fit of a protocol. Raises DoesNotFit or UserError."""
    if config.protocol == "robustness":
        raise UserError("config.protocol=robustness stores no features: there is nothing to plan")
    mesh = sharding.make_mesh(roots.MeshConfig(), devices_of(topology))
    sharding.process_rows(mesh, config.batch_size, process=0)  # UserError if not divisible
    batch_size, width = config.batch_size, sizes.width
    lengths = [min(n, config.max_examples or n) for n in (sizes.examples, sizes.test_examples)]
    train, test = (_bank(length, batch_size, width, mesh) for length in lengths)
    bank_bytes = len(config.features) * (sharded_bytes(train) + sharded_bytes(test))
    fitted = train
    if config.protocol != "knn" and 0 not in config.shots:  # copied to their own bank
        fitted = _bank(max(config.shots) * sizes.classes, batch_size, width, mesh)
        bank_bytes += sharded_bytes(fitted)
    start = time.monotonic()
    temporary_bytes, code_bytes = 0.0, 0.0
    if config.protocol != "fewshot":  # solved on the hosts
        knn_search = config.protocol == "knn"
        lowered = _search(config, fitted, mesh) if knn_search else _fit(sizes, fitted, mesh)
        memory: Any = compile_for(lowered, topology).memory_analysis()
        temporary_bytes = memory.peak_memory_in_bytes - sharded_bytes(fitted)
        code_bytes = memory.generated_code_size_in_bytes
    seconds = time.monotonic() - start
    plan = EvalPlan(topology, bank_bytes, temporary_bytes, code_bytes, seconds)
    if plan.peak_bytes > topology.chip.hbm:
        raise DoesNotFit(plan.peak_bytes, topology.chip.hbm)
    return plan


def _bank(
    length: int, batch_size: int, width: int, mesh: jax.sharding.Mesh
) -> jax.ShapeDtypeStruct:
    """Abstract feature bank: (steps, batch, width)."""
    shape = feature_bank.bank_steps(length, batch_size, mesh), batch_size, width
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding.microbatch_sharding(mesh))


def _labels(bank: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Abstract labels or folds of a bank."""
    return jax.ShapeDtypeStruct(bank.shape[:2], np.int32, sharding=bank.sharding)


def _search(
    config: EvaluateConfig, bank: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    queries = jax.ShapeDtypeStruct(bank.shape[1:], np.float32, sharding=sharding.replicated(mesh))
    k = min(max(config.k), math.prod(bank.shape[:2]))
    return knn.nearest_neighbors.lower(queries, (bank, _labels(bank)), k, mesh)


def _fit(sizes: Sizes, bank: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    width, replicated = bank.shape[-1], sharding.replicated(mesh)
    scale = (jax.ShapeDtypeStruct((width,), np.float32, sharding=replicated),) * 2
    problem = bank, _labels(bank), _labels(bank)
    return probe.fit.lower(problem, scale, 0, 1.0, 1, classes=sizes.classes, mesh=mesh)


def advice(config: EvaluateConfig) -> str:
    """Returns what to change if an evaluation does not fit."""
    if len(config.features) > 1:
        name = config.features[0]
        return f"try --config.features={name}, one kind at a time, or more chips"
    return "use more or larger chips"
