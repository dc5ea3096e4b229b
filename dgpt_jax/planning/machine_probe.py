"""Reads a teacher's sizes and the devices of this machine, in a process of its own: a process that
starts JAX holds the devices until it ends.

    python -m dgpt_jax.planning.machine_probe TEACHER [INIT]

prints JSON in its last line.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import psutil

from dgpt_jax.config import TeacherConfig
from dgpt_jax.data import segments
from dgpt_jax.errors import MissingHeads, UserError, one_line
from dgpt_jax.planning import chips
from dgpt_jax.planning.training_choice import Devices
from dgpt_jax.training import initial_weights
from dgpt_jax.weights import hub, registry, teacher_loading, types

CPU_SHARE, CPU_CAP = 0.5, 16_000_000_000  # of the free memory, at most


def run(teacher: str, init: str | None = None) -> dict[str, Any]:
    """Returns {"devices": fields of Devices, "teacher": {"weights": name to use, "image_size",
    "tokens": tokens per image, "width": of a token}, "init": {"weights", "model": fields of
    ModelConfig, "mean", "std"} or None}, by another process. Raises UserError."""
    words = [sys.executable, "-m", "dgpt_jax.planning.machine_probe", teacher]
    words += [init] if init else []
    ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {ended.returncode}"
        raise UserError(last.removeprefix("error: "))
    return json.loads(ended.stdout.splitlines()[-1])


def devices() -> Devices:
    """Returns the devices of JAX. The memory of a CPU is half of what is free, at most 16 GB; 0 if
    unknown."""
    local = jax.local_devices()
    platform, kind = local[0].platform, local[0].device_kind
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in local]
    chip = chips.of(kind)
    if platform == "cpu":
        memory = min(CPU_SHARE * psutil.virtual_memory().available / len(local), CPU_CAP)
    elif all(limits):
        memory = min(limits)
    else:
        memory = chip.hbm if chip is not None else 0
    return Devices(platform, kind, len(local), int(memory))


def _teacher(name: str) -> dict[str, Any]:
    loaded = teacher_loading.load_configured(TeacherConfig(weights=name))
    tower = loaded.tower
    tokens = tower.grid[0] * tower.grid[1] + tower.cls
    return {
        "weights": loaded.name if hub.is_name(name) else name,
        "image_size": tower.image_size,
        "tokens": tokens,
        "width": tower.token_width,
    }


def _initial_weights(path: str) -> dict[str, Any]:
    """Returns the sizes and settings of an encoder to start from. Raises UserError."""
    try:
        weights = registry.read(path, encoder_only=True)[1]
        fields = initial_weights.ENCODER_FIELDS
    except MissingHeads:
        weights = registry.read(path, heads=1, decoder_heads=1, encoder_only=True)[1]
        fields = tuple(name for name in initial_weights.ENCODER_FIELDS if name != "heads")
    weights = types.encoder(weights, None)
    model, preprocess = weights.model, weights.preprocess
    table = segments.sincos_table(model.width, model.grid)
    error = float(np.abs(weights.params["pos_embed"] - table).max())
    fixed = error <= initial_weights.MAX_SINCOS_ERROR
    values = {name: getattr(model, name) for name in fields}
    return {
        "weights": weights.source if hub.is_name(path) else path,
        "model": values | {"positions": "sincos" if fixed else "learned"},
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


def main():
    try:
        teacher, *init = sys.argv[1:]
        result = {
            "teacher": _teacher(teacher),
            "init": _initial_weights(init[0]) if init else None,
            "devices": vars(devices()),
        }
    except UserError as e:
        sys.exit(f"error: {e}")
    except RuntimeError as e:  # JAX without a device
        sys.exit(f"error: {one_line(e)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
