"""The initial state is created sharded."""

import jax
import pytest

from dgpt_jax.config import MeshConfig, roots
from dgpt_jax.distributed import sharding
from dgpt_jax.models import digpt
from dgpt_jax.training import optimizer, train_step
from tests.support.data import tiny_model
from tests.support.processes import on_devices


def on_eight_devices():
    model = tiny_model(width=256, depth=6, decoder_width=128)
    module = digpt.build(model, out_width=128)

    def init(key):
        return module.init(key, *digpt.dummy_inputs(model))["params"]

    def peak(mesh) -> float:
        """Peak bytes of a device during initialization over the bytes of the state."""
        tx = optimizer.optimizer(roots.OptimConfig(), 1e-3)
        total = sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(train_step.abstract_state(init, tx, mesh))
        )
        memory = (
            train_step.jit_init_state(init, tx, mesh)
            .lower(jax.random.key(0))
            .compile()
            .memory_analysis()
        )
        return (memory.output_size_in_bytes + memory.temp_size_in_bytes) / total

    assert peak(sharding.make_mesh(MeshConfig(data=1, fsdp=8))) < 0.25
    assert (
        peak(sharding.make_mesh(MeshConfig(data=8, fsdp=1))) >= 1
    )  # the measurement does detect full copies


@pytest.mark.slow
def test_no_device_holds_an_unsharded_copy():
    on_devices(8, on_eight_devices)
