"""The train step compiled for TPU pods that are not there (`pytest -m tpu_aot`; extra `plan`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In a process of its own: libtpu must not reach the tests that run on the CPU.
COMPILE = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from dgpt_jax import cli, config, metrics, optim, schema, sharding, state, step
from dgpt_jax.tasks.pretrain import Pretrain
from tests.tpu_aot_test import fake_store

root, topology, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
made = cli.load_config("configs/pretrain_b16_in1k.py")
made.data.path = str(fake_store(root, grid=16, width=1024))
run = schema.parse(config.Train, made)
found = topologies.get_topology_desc(topology, "tpu").devices
assert len(found) == devices, found
mesh = sharding.make_mesh(run.mesh, found)
task = Pretrain(run)
tx = optim.optimizer(run.optim, optim.schedule(1e-3, 10, 100))
begun = state.abstract(task.init, tx, mesh)
running = jax.eval_shape(metrics.averages(task.metric_names).empty)
example = task.examples(0, 0)
rows = lambda x: jax.ShapeDtypeStruct(
    (run.batch_size, *np.shape(x)), x.dtype, sharding=sharding.batch_sharding(mesh))
running = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding.replicated(mesh)), running)
started = time.monotonic()
step_fn = step.make_train_step(task.loss, tx, mesh, accum_steps=run.accum_steps)
compiled = step_fn.lower(begun, running, jax.tree.map(rows, example), {}).compile()
memory = compiled.memory_analysis()
peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
print(f"compiled {time.monotonic() - started:.0f} s, {peak / 2**30:.2f} GiB a device")
text = compiled.as_text()
assert "all-reduce" in text and jax.default_backend() == "cpu"
assert peak < 15.75 * 2**30
"""


def fake_store(root, *, grid: int, width: int):
    """A token store of 4 pictures 224×224 with random tokens."""
    import numpy as np

    from dgpt_jax import records, views
    from dgpt_jax.records import StoreInfo

    directory = Path(root) / "tokens"
    directory.mkdir()
    rng = np.random.default_rng(0)
    info = StoreInfo(
        codec="int8", grid=(grid, grid), cls=True, width=width, channel_scale=(1.0,) * width,
        cosine=(1.0, 1.0), picture_size=224, picture="png", teacher={"name": "none", "hash": ""},
        source={}, views={}, code_version="",
    )  # fmt: skip
    features = records.token_features(info, None)
    picture = views.encode_picture(np.zeros((224, 224, 3), np.uint8), "png")
    examples = [
        {
            "id": str(i), "image": picture, "box": np.array([0, 0, 224, 224], np.int32),
            "tokens": rng.integers(-127, 128, (info.tokens, width), np.int8), "flip": np.int32(0),
        }
        for i in range(4)
    ]  # fmt: skip
    split = records.view_split(0)
    records.write_shard(records.shard_path(directory, split, 0, 1), features, examples)
    info.save(directory)
    records.write_metadata(directory, features, {split: [4]})
    return directory


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology,devices", [("v5e:4x4", 16)])
def test_the_step_compiles_for_a_pod(tmp_path, topology, devices):
    pytest.importorskip("libtpu")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path), topology, str(devices)],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(ended.stdout)
