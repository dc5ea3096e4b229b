"""Host memory of commands on a sharded checkpoint, measured in separate processes.

REHEARSAL_SIZE=L/14 (or another model size) is the full size: 5 GB of disk.
"""

import json
import os
import sys

import pytest

from tests.support import watch
from tests.support.processes import outputs_of, start

SIZE = os.environ.get("REHEARSAL_SIZE", "")

# Three training states with parameters and both moments sharded over four devices.
WRITE = """
import dataclasses, json, sys
import jax
from dgpt_jax.config import roots as config, schema
from dgpt_jax.models import digpt
from dgpt_jax.training import checkpointing as saving, optimizer as optim, train_step
from dgpt_jax.distributed import sharding
path, model = sys.argv[1], schema.parse(config.ModelConfig, json.loads(sys.argv[2]))
train = dataclasses.replace(config.TrainConfig(), model=model)
mesh = sharding.make_mesh(config.MeshConfig(fsdp=4))
tx = optim.optimizer(train.optim, lambda step: 1e-3)
module = digpt.build(model, out_width=8)
def init(key):
    return module.init(key, *digpt.dummy_inputs(model))["params"]
made = train_step.init_state(init, tx, mesh, 0)
kernel = made.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
assert len({str(s.index) for s in kernel.addressable_shards}) == 4
with saving.Checkpoints(path, keep=3) as checkpoints:
    for step in range(3):
        made = dataclasses.replace(made, step=made.step + 1)
        checkpoints.save(made, {"config": schema.to_dict(train)})
        checkpoints.last_save_failed(wait=True)
for tree in (made.params["encoder"], made.params):
    print(sum(x.nbytes for x in jax.tree.leaves(tree)))
"""
# Commands need no other framework.
WITHOUT_FRAMEWORKS = 'sys.modules |= {"timm": None, "torch": None, "transformers": None}\n'
LOAD = "import dgpt_jax; loaded = getattr(dgpt_jax, sys.argv[1])(sys.argv[2])"
# Arguments (RUN: work directory, OUT: output path), and the memory limit as a multiple of the bytes
# read or written.
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


def write_run(path, model: dict) -> list[int]:
    """Writes a work directory. Returns the bytes of the encoder and of all weights."""
    process = start(["-c", WRITE, path, json.dumps(model)], devices=4)
    (output,) = outputs_of([process])
    assert process.returncode == 0, output
    return [int(line) for line in output.splitlines() if line.isdigit()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(work directory, bytes of the encoder, bytes of all weights) of a small and a large model."""
    small = dict(width=64, depth=12, heads=4, patch=16, image_size=32, decoder_width=32,
                 decoder_depth=1, decoder_heads=2)  # fmt: skip
    large = small | dict(width=640, decoder_width=512, decoder_heads=8)
    runs = []
    for model in (small, {"size": SIZE} if SIZE else large):
        path = tmp_path_factory.mktemp("run")
        runs.append((path, *write_run(path, model)))
    return runs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", FORMS)
def test_memory(form, runs, tmp_path):
    """Growth of the peak from the small to the large model, relative to the weights."""
    words, limit = FORMS[form]
    peaks, sizes, files = [], [], []
    for i, (path, *all_bytes) in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        paths = {"RUN": str(path), "OUT": str(tmp_path / str(i) / "out")}
        args = [word.replace("OUT", paths["OUT"]) if "OUT" in word else paths.get(word, word)
                for word in words]  # fmt: skip
        usage = watch.usage_of(
            WITHOUT_FRAMEWORKS + (LOAD if form.startswith("load") else watch.SCRIPT), *args
        )
        peaks.append(usage["peak"])
        files.append(usage["files"])
        sizes.append(all_bytes[form not in ENCODERS])
    assert sizes[1] > 200e6
    ratio = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    print(
        f"{form}: {sizes[1] / 1e6:.0f} MB, {ratio:.2f} times that, over {peaks[0] / 1e6:.0f} MB; "
        f"{files[1]} open files"
    )
    assert ratio < limit
    assert max(files) < 100
