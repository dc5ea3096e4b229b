"""Plans for absent hardware. Tests that compile for TPUs need the extra `plan` and have the marker
tpu_aot; they use subprocesses, because libtpu must not be loaded in other tests."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from dgpt_jax import cli
from dgpt_jax.config import roots, schema
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.models import digpt
from dgpt_jax.planning import chips, plan
from dgpt_jax.training.tasks import task_without_data
from tests.support.paths import ROOT

GIB = 2**30
B16 = f"--config={ROOT / 'configs/pretrain_b16_in1k.py'}"
# Two blocks and one decoder: seconds to compile.
SMALL = ["--config.model.depth=2", "--config.model.decoder_depth=1", "--config.loss.visible=0"]


def run_plan(*words, code: int = 0) -> tuple[list[dict], str]:
    """Returns (reports, stderr) of tools/plan.py."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), "--json", *words],
        cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == code, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


@pytest.mark.parametrize(
    "text,chip_count,formatted",
    [
        ("v4:2x2x4", 16, "v4:2x2x4 = 16 chips = v4-32"),
        ("v5p:4x4x8", 128, "v5p:4x4x8 = 128 chips = v5p-256"),
        ("v5e:16x16", 256, "v5e:16x16 = 256 chips = v5e-256"),
        ("2*v6e:8x8", 128, "2*v6e:8x8 = 128 chips = 2*v6e-64"),
    ],
)
def test_topologies_and_the_names_of_slices(text, chip_count, formatted):
    topology = chips.topology(text)
    assert topology.chips == chip_count and str(topology) == formatted


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v9:2x2", "v5e:2x", "x*v5e:2x2"])
def test_invalid_topologies(text):
    with pytest.raises(UserError, match=f"{re.escape(repr(text))}.* v5e:4x4"):
        chips.topology(text)


@pytest.mark.parametrize("targets", ["stored", "pixels"])
def test_a_step_is_lowered_without_data(targets):
    """With the arguments of training: the state and a batch of the configured size."""
    config_dict = cli.load_config(str(ROOT / "configs/pretrain_b16_in1k.py"))
    config_dict.model.update(depth=2, decoder_depth=1)
    config_dict.batch_size, config_dict.data.targets = 8, targets
    config_dict.loss.visible = 0.0
    config = schema.parse(roots.TrainConfig, config_dict)
    task = task_without_data(config)
    lowered, state, batch = plan.lower(config, task, sharding.make_mesh(config.mesh))
    assert batch["image"].shape == (8, 224, 224, 3)
    assert ("tokens" in batch) == (targets == "stored")
    assert state.params["encoder"]["blocks"]["attn"]["qkv"]["kernel"].shape == (2, 3, 768, 768)
    assert "stablehlo" in lowered.as_text()
    assert plan.steps_of(config) == 300 * 1281167 // 8


def test_a_plan_needs_the_size_of_the_teacher():
    config_dict = schema.default_config(roots.TrainConfig)
    config_dict.data.path = "absent"
    with pytest.raises(UserError, match="config.teacher.width .*config.teacher.grid"):
        task_without_data(schema.parse(roots.TrainConfig, config_dict))


def test_bounds_for_gpus():
    result = subprocess.run(
        [sys.executable, "tools/plan.py", B16, "--device=gpu"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "model 153.3 G" in result.stdout
    assert "h200: at most 6451 images/s" in result.stdout


def params_of(name: str) -> int:
    model = schema.parse(roots.ModelConfig, {"size": name})
    module = digpt.build(model, out_width=1024)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *digpt.dummy_inputs(model))
    return sum(x.size for x in jax.tree.leaves(shapes))


# Topology, model, upper bounds of GiB and GB moved, and the number of micro-batches, each of which
# reduces gradients.
PODS = {
    "pretrain_b16_in1k.py:v5e-16": ("v5e:4x4", "B/16", 11.5, 180, 2),
    "pretrain_l14_in1k.py:v5e-64": ("v5e:8x8", "L/14", 13.0, 120, 2),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", PODS)
def test_pods(name):
    topology, size, memory, traffic, micro_batches = PODS[name]
    (report,), _ = run_plan(f"--config={ROOT / 'configs' / name}", f"--topology={topology}")
    assert report["fits"] and report["hbm_bytes"]["sum"] < memory * GIB
    assert report["moved_bytes"] < traffic * 1e9
    # All FLOPs of the formula except attention, which is in kernels.
    assert 0.95 < report["compiled_flops_an_image"] / report["model_flops_an_image"] <= 1
    # Only gradients are reduced, in bfloat16; no activations or weights are gathered.
    assert {c["kind"] for c in report["collectives"]} == {"all-reduce"}
    reduced = sum(c["bytes"] for c in report["collectives"])
    assert reduced == pytest.approx(micro_batches * 2 * params_of(size), rel=0.02)


@pytest.mark.tpu_aot
def test_a_step_that_does_not_fit_gets_a_change():
    words = [B16, "--topology=v5e:2x2", *SMALL, "--config.batch_size=4096"]
    (report,), message = run_plan(*words, code=1)
    assert not report["fits"] and report["needed_bytes"] > 15.75 * GIB
    assert message.startswith("error: v5e:2x2 = 4 chips = v5e-4 ") and message.count("\n") == 1
    change = message.split(" with ")[1].split()
    assert change == ["--config.accum_steps=2"]
    (fitting,), _ = run_plan(*words, *change)
    assert fitting["fits"]


# Upper bounds for ViT-H features of ImageNet-1K, as in docstrings of evals/: bytes per chip of the
# features of both kinds and splits, and of temporaries.
EVALUATIONS = {
    "linear_in1k.py:v5e:4x4": (0.80 * GIB, 0.15 * GIB),
    "linear_in1k.py:v4:2x2x4": (0.80 * GIB, 0.15 * GIB),
    "knn_in1k.py:v5e:8x8": (220e6, 80e6),
    "fewshot_in1k.py:v5e:4x4": (0.85 * GIB, 0),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations(name):
    file, _, topology = name.partition(":")
    features, temporaries = EVALUATIONS[name]
    (report,), _ = run_plan(
        f"--config={ROOT / 'configs' / file}", f"--topology={topology}", "--width=1280"
    )
    hbm = report["hbm_bytes"]
    assert report["fits"] and hbm["features"] <= features and hbm["temporaries"] <= temporaries
    assert hbm["sum"] == hbm["features"] + hbm["temporaries"] + hbm["code"]


@pytest.mark.tpu_aot
def test_an_evaluation_that_does_not_fit():
    (report,), message = run_plan(
        f"--config={ROOT / 'configs/fewshot_in1k.py'}", "--topology=v5e:2x2", "--width=1280",
        "--examples=14000000", code=1,
    )  # fmt: skip
    assert not report["fits"] and report["needed_bytes"] > 15.75 * GIB
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--topology=v5e:2x2"], ["--width=768", "--device=gpu"], ["--width=768", "--images_a_chip=4"],
     ["--width=768"], ["--width=0", "--topology=v5e:2x2"]],
)  # fmt: skip
def test_flags_of_an_evaluation(words):
    """--width and --topology are required; flags of training configs are refused."""
    config_flag = f"--config={ROOT / 'configs/linear_in1k.py'}"
    reports, message = run_plan(config_flag, *words, code=1)
    assert not reports and message.startswith("error: ") and message.count("\n") == 1
