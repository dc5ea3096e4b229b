"""The state is made where it will lie."""

import jax

from dgpt_jax import config, digpt, optim, sharding, state
from dgpt_jax.config import Mesh
from tests.data import tiny_model
from tests.processes import on_devices


def on_eight_devices():
    model = tiny_model(width=256, depth=6, decoder_width=128)
    module = digpt.build(model, out_width=128)

    def init(key):
        return module.init(key, *digpt.dummy_inputs(model))["params"]

    def peak(mesh) -> float:
        """Bytes that a device holds while the state is made, over those of the whole state."""
        tx = optim.optimizer(config.Optim(), 1e-3)
        whole = sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(state.abstract(init, tx, mesh))
        )
        memory = state.maker(init, tx, mesh).lower(jax.random.key(0)).compile().memory_analysis()
        return (memory.output_size_in_bytes + memory.temp_size_in_bytes) / whole

    assert peak(sharding.make_mesh(Mesh(data=1, fsdp=8))) < 0.25
    assert peak(sharding.make_mesh(Mesh(data=8, fsdp=1))) >= 1  # so the measure sees whole copies


def test_no_device_ever_holds_an_unsharded_copy():
    on_devices(8, on_eight_devices)
