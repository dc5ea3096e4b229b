"""Clustered features, and meshes and processes to evaluate them on."""

import socket

import jax
import numpy as np

from dgpt_jax.config import roots
from dgpt_jax.distributed import sharding
from tests.support.processes import outputs_of, start


def clusters(n, seed, classes=5, width=16, spread=2.5):
    centers = np.random.default_rng(0).standard_normal((classes, width)) * 1.2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = centers[labels] + spread * rng.standard_normal((n, width))
    return x.astype(np.float32), labels


def mesh_of(devices: int):
    return sharding.make_mesh(roots.MeshConfig(), jax.devices()[:devices])


def in_processes(count: int, devices: int, function):
    """Calls a function of a test module in `count` processes of one program with `devices` each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    call = (
        "import jax, {0} as tests; jax.distributed.initialize({1!r}, {2}, {3}); tests.{4}()"
    ).format
    names = function.__module__, address, count
    processes = [
        start(["-c", call(*names, i, function.__name__)], devices=devices) for i in range(count)
    ]
    outputs = outputs_of(processes)
    assert all(p.returncode == 0 for p in processes), "\n".join(o[-2000:] for o in outputs)
