"""Meshes of absent devices: pods, several TPU slices, several GPU nodes."""

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from dgpt_jax.config import MeshConfig
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from tests.support.paths import ROOT


@dataclass(frozen=True)
class Device:
    """Attributes of a device that determine the mesh."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def slices(count: int, side: int = 4) -> list[Device]:
    """`count` slices of side×side v5e chips, four per host."""
    devices = []
    for index in range(count):
        for y, x in np.ndindex(side, side):
            host = (index * side // 2 + y // 2) * side // 2 + x // 2
            devices.append(Device(len(devices), host, index, (x, y, 0)))
    return devices


@pytest.mark.parametrize(
    "sizes,message",
    [
        ((-1, -1, 1), r"'data': -1, 'fsdp': -1, 'tensor': 1}: .*positive"),
        ((0, 1, 1), r"'data': 0, .*: .*positive"),
        ((-2, 1, 1), r"'data': -2, .*: .*positive"),
        ((3, 1, 1), r"'data': 3, .* 16, "),
        ((-1, 3, 1), r"'fsdp': 3, .* 16, "),
        ((-1, 32, 1), r"'fsdp': 32, .* 16, "),
    ],
)
def test_sizes_that_do_not_match_the_devices(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(MeshConfig(*sizes), slices(1))


@pytest.mark.parametrize("sizes", [(-1, 16, 1), (2, 16, 1), (4, 8, 1), (4, 4, 2), (-1, 1, 1)])
def test_only_data_crosses_slices(sizes):
    devices = slices(2)
    mesh = sharding.make_mesh(MeshConfig(*sizes), devices)
    assert len(set(mesh.devices.flat)) == len(devices)
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (index == index[:, :1, :1]).all()
    assert [*index[:, 0, 0]] == sorted(index[:, 0, 0])  # each once


def test_data_axis_not_divisible_by_the_slices():
    with pytest.raises(UserError, match=r"data is 1 on 2 TPU slices: .*multiple of 2"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=-1), slices(2))
    with pytest.raises(UserError, match=r"data is 4 on 3 TPU slices: .*multiple of 3"):
        sharding.make_mesh(MeshConfig(data=4, fsdp=12), slices(3))


def test_gpu_nodes_are_not_slices():
    """JAX gives each node of a GPU cluster a slice_index; fsdp may cross them."""
    devices = [Device(i, i // 8, i // 8, platform="gpu", device_kind="H100") for i in range(16)]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), devices[8:] + devices[:8])
    assert [device.id for device in mesh.devices.flat] == [*range(16)]


# In its own process: libtpu must not be loaded in tests that run on the CPU.
PODS = """
import itertools, sys
import numpy as np
from jax.experimental import topologies
from dgpt_jax.distributed import sharding
from dgpt_jax.config import MeshConfig

for topology, count in (("v5e:4x4", 1), ("v5e:4x4", 2), ("v6e:4x4", 2), ("v5p:2x2x4", 1)):
    more = {"num_slices": count} if count > 1 else {}
    devices = topologies.get_topology_desc(topology, "tpu", **more).devices
    hosts = {device.process_index for device in devices}
    for sizes in ((-1, 1, 1), (-1, 4, 1), (count, -1, 1), (-1, 2, 2)):
        mesh = sharding.make_mesh(MeshConfig(*sizes), devices)
        if count > 1:
            index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
            assert len(set(index.flat)) == count and (index == index[:, :1, :1]).all(), index
        rows = [sharding.process_rows(mesh, 64, host) for host in sorted(hosts)]
        assert {*itertools.chain(*rows)} == set(range(64)), rows
        scattered = sum(r[-1] - r[0] >= len(r) for r in rows)
        print(topology, count, *mesh.devices.shape, len(hosts), "hosts", scattered, "scattered")
"""


@pytest.mark.tpu_aot
def test_pods_described_by_libtpu():
    """Slices, and the rows of the batch of every host."""
    pytest.importorskip("libtpu")
    env = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", PODS],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
