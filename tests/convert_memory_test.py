"""What an export out of a sharded checkpoint needs in host memory, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A training state on four devices, its parameters and both moments split over them.
WRITE = """
import dataclasses, json, sys
import jax
from dgpt_jax import config, digpt, optim, saving, schema, sharding, state
path, model = sys.argv[1], schema.parse(config.Model, json.loads(sys.argv[2]))
train = dataclasses.replace(config.Train(), model=model)
mesh = sharding.make_mesh(config.Mesh(fsdp=4))
tx = optim.optimizer(train.optim, lambda step: 1e-3)
module = digpt.build(model, out_width=8)
def init(key):
    return module.init(key, *digpt.dummy_inputs(model))["params"]
made = state.create(init, tx, mesh, 0)
kernel = made.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
assert len({str(s.index) for s in kernel.addressable_shards}) == 4
with saving.Checkpoints(path, keep=1) as checkpoints:
    checkpoints.save(made, {"config": schema.to_dict(train)})
for tree in (made.params["encoder"], made.params):
    print(sum(x.nbytes for x in jax.tree.leaves(tree)))
"""
EXPORT = """
import resource, sys
sys.modules |= {"timm": None, "torch": None, "transformers": None}
sys.path.insert(0, "tools")
import convert
sys.argv = ["convert", *sys.argv[1:]]
convert.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
FORMS = {
    "timm": ("out", "--to=timm"),
    "hf": ("out", "--to=hf"),
    "big_vision": ("out.npz", "--to=big_vision", "--activation=gelu_tanh"),
    "safetensors": ("out.safetensors", "--to=safetensors"),
    "flax": ("out", "--to=flax"),
    "digpt": ("out.safetensors", "--to=digpt"),
}
FULL = ("safetensors", "flax", "digpt")
# Orbax keeps all that it is to write until it writes.
MOST = {"flax": 2.6}


def run(code, *words, devices: int) -> list[int]:
    """The numbers that a process of its own prints."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [int(line) for line in ended.stdout.splitlines() if line.isdigit()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories of a small and a large model, with the bytes of encoder and of all."""
    small = dict(width=64, depth=12, heads=4, patch=16, image_size=32, decoder_width=32,
                 decoder_depth=1, decoder_heads=2)  # fmt: skip
    made = []
    for model in (small, small | dict(width=640, decoder_width=512, decoder_heads=8)):
        path = tmp_path_factory.mktemp("run")
        made.append((path, *run(WRITE, path, json.dumps(model), devices=4)))
    return made


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes there")
@pytest.mark.parametrize("form", FORMS)
def test_memory(form, runs, tmp_path):
    """At most 1.5 times the exported bytes, beyond what the same of a small model needs."""
    name, *words = FORMS[form]
    peaks, sizes = [], []
    for i, (path, *all_bytes) in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        sizes.append(all_bytes[form in FULL])
        peaks.extend(run(EXPORT, path, tmp_path / str(i) / name, *words, devices=1))
    assert sizes[1] > 200e6
    more = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    print(
        f"{form}: {sizes[1] / 1e6:.0f} MB, {more:.2f} times as much, over {peaks[0] / 1e6:.0f} MB"
    )
    assert more < MOST.get(form, 1.5)
