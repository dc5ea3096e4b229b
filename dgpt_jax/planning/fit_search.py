"""Search for a change of config that makes a training step fit, by compiling candidates."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dgpt_jax.config import TrainConfig
from dgpt_jax.errors import UserError
from dgpt_jax.planning.chips import Topology
from dgpt_jax.planning.plan import DoesNotFit, Plan, plan_training


def first_fitting_change(
    config: TrainConfig, topology: Topology, say: Callable[[str], None] = print
) -> tuple[str, Plan] | None:
    """Returns (flags, plan) of the first candidate that fits, or None.

    Candidates are combinations of more micro-batches, parameters sharded over fsdp, and full remat.
    """
    for change in _candidates(config, topology):
        flags = _as_flags(change)
        try:
            return flags, plan_training(dataclasses.replace(config, **change), topology)
        except DoesNotFit as e:
            say(f"tried {flags}: {e}")
        except UserError as e:
            say(f"not possible: {flags}: {e}")
    return None


def _candidates(config: TrainConfig, topology: Topology) -> list[dict[str, Any]]:
    """Changes of config fields, cheapest first."""
    chips_per_slice = topology.chips // topology.slices
    images_per_chip = config.batch_size // topology.chips
    split = dataclasses.replace(config.mesh, data=-1, fsdp=chips_per_slice // config.mesh.tensor)
    full = dataclasses.replace(config.model, remat="full")
    counts = (k * config.accum_steps for k in (2, 4, 8))
    accumulations = [{"accum_steps": n} for n in counts if n <= images_per_chip]
    bases = [{"mesh": split}, {"model": full}, {"mesh": split, "model": full}]
    with_base = [base | change for base in bases for change in ({}, *accumulations)]
    return [*accumulations, *with_base]


def _as_flags(change: dict[str, Any]) -> str:
    """Formats a change of config fields as command-line flags."""
    flags = []
    for name, value in change.items():
        if name == "mesh":
            flags += ["--config.mesh.data=-1", f"--config.mesh.fsdp={value.fsdp}"]
        elif name == "model":
            flags.append(f"--config.model.remat={value.remat}")
        else:
            flags.append(f"--config.{name}={value}")
    return " ".join(flags)
