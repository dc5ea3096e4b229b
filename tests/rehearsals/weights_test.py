"""What commands on a sharded checkpoint need in host memory, in processes of their own.

REHEARSAL_SIZE=L/14 (or another size of config.Model) rehearses it at real size: 5 GB of disk.
"""

import json
import os
import sys

import pytest

from tests import watch
from tests.processes import outputs_of, start

SIZE = os.environ.get("REHEARSAL_SIZE", "")

# Three training states on four devices, parameters and both moments split over them.
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
with saving.Checkpoints(path, keep=3) as checkpoints:
    for step in range(3):
        made = dataclasses.replace(made, step=made.step + 1)
        checkpoints.save(made, {"config": schema.to_dict(train)})
        checkpoints.failed(wait=True)
for tree in (made.params["encoder"], made.params):
    print(sum(x.nbytes for x in jax.tree.leaves(tree)))
"""
# What follows needs no other framework.
ALONE = 'sys.modules |= {"timm": None, "torch": None, "transformers": None}\n'
LOAD = "import dgpt_jax; loaded = getattr(dgpt_jax, sys.argv[1])(sys.argv[2])"
# Words of the command (RUN: the work directory, OUT: a new place), and how many times the bytes of
# what it reads or writes it may need.
CONVERT, CHECKPOINT = "tools/convert.py", "tools/checkpoint.py"
FORMS = {
    "timm": ([CONVERT, "RUN", "OUT", "--to=timm"], 1.5),
    "hf": ([CONVERT, "RUN", "OUT", "--to=hf"], 1.5),
    "big_vision": ([CONVERT, "RUN", "OUT.npz", "--to=big_vision", "--activation=gelu_tanh"], 1.5),
    "safetensors": ([CONVERT, "RUN", "OUT.safetensors", "--to=safetensors"], 1.5),
    "flax": ([CONVERT, "RUN", "OUT", "--to=flax"], 1.75),
    "digpt": ([CONVERT, "RUN", "OUT.safetensors", "--to=digpt"], 1.5),
    "extract": ([CHECKPOINT, "extract", "RUN", "OUT.safetensors"], 1.5),
    "average": ([CHECKPOINT, "average", "RUN", "OUT", "--last=3"], 2.5),
    "moving average": ([CHECKPOINT, "average", "RUN", "OUT", "--last=3", "--decay=0.9"], 2.5),
    "inspect": ([CHECKPOINT, "inspect", "RUN"], 0.05),
    "load_encoder": (["load_encoder", "RUN"], 1.75),
    "load_digpt": (["load_digpt", "RUN"], 1.75),
}
ENCODERS = ("timm", "hf", "big_vision", "load_encoder")


def written(path, model: dict) -> list[int]:
    """Bytes of the encoder and of all weights in a new work directory."""
    process = start(["-c", WRITE, path, json.dumps(model)], devices=4)
    (output,) = outputs_of([process])
    assert process.returncode == 0, output
    return [int(line) for line in output.splitlines() if line.isdigit()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories of a small and a large model, with the bytes of encoder and of all."""
    small = dict(width=64, depth=12, heads=4, patch=16, image_size=32, decoder_width=32,
                 decoder_depth=1, decoder_heads=2)  # fmt: skip
    large = small | dict(width=640, decoder_width=512, decoder_heads=8)
    made = []
    for model in (small, {"size": SIZE} if SIZE else large):
        path = tmp_path_factory.mktemp("run")
        made.append((path, *written(path, model)))
    return made


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", FORMS)
def test_memory(form, runs, tmp_path):
    """So many times the bytes of the weights, beyond what the same of a small model needs."""
    words, most = FORMS[form]
    peaks, sizes, files = [], [], []
    for i, (path, *all_bytes) in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        places = {"RUN": str(path), "OUT": str(tmp_path / str(i) / "out")}
        given = [word.replace("OUT", places["OUT"]) if "OUT" in word else places.get(word, word)
                 for word in words]  # fmt: skip
        usage = watch.usage_of(ALONE + (LOAD if form.startswith("load") else watch.SCRIPT), *given)
        peaks.append(usage["peak"])
        files.append(usage["files"])
        sizes.append(all_bytes[form not in ENCODERS])
    assert sizes[1] > 200e6
    more = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    print(
        f"{form}: {sizes[1] / 1e6:.0f} MB, {more:.2f} times as much, over {peaks[0] / 1e6:.0f} MB; "
        f"{files[1]} open files"
    )
    assert more < most
    assert max(files) < 100
