"""Plans for hardware that is not there. What compiles for TPUs needs the extra `plan` and carries
the marker tpu_aot; it runs in processes of its own, because libtpu must not reach other tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dgpt_jax import chips, cli, config, digpt, plan, schema, sharding
from dgpt_jax.schema import UserError
from dgpt_jax.tasks import planned

ROOT = Path(__file__).parent.parent
GIB = 2**30
B16 = f"--config={ROOT / 'configs/pretrain_b16_in1k.py'}"
# Two blocks and one decoder: seconds to compile.
SMALL = ["--config.model.depth=2", "--config.model.decoder_depth=1", "--config.loss.visible=0"]


def planned_by_command(*words, code: int = 0) -> tuple[list[dict], str]:
    """(the reports of tools/plan.py, its stderr)."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), "--json", *words],
        cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr


@pytest.mark.parametrize(
    "text,chip_count,shown",
    [
        ("v4:2x2x4", 16, "v4:2x2x4 = 16 chips = v4-32"),
        ("v5p:4x4x8", 128, "v5p:4x4x8 = 128 chips = v5p-256"),
        ("v5e:16x16", 256, "v5e:16x16 = 256 chips = v5e-256"),
        ("2*v6e:8x8", 128, "2*v6e:8x8 = 128 chips = 2*v6e-64"),
    ],
)
def test_topologies_and_the_names_of_slices(text, chip_count, shown):
    found = chips.topology(text)
    assert found.chips == chip_count and str(found) == shown


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v9:2x2", "v5e:2x", "x*v5e:2x2"])
def test_what_is_no_topology(text):
    with pytest.raises(UserError, match="cannot read the topology"):
        chips.topology(text)


@pytest.mark.parametrize("targets", ["stored", "pixels"])
def test_a_step_is_lowered_without_data(targets):
    """The plan's arguments are those of training: the state, a batch of the configured size."""
    made = cli.load_config(str(ROOT / "configs/pretrain_b16_in1k.py"))
    made.model.update(depth=2, decoder_depth=1)
    made.batch_size, made.data.targets, made.loss.visible = 8, targets, 0.0
    run = schema.parse(config.Train, made)
    task = planned(run)
    lowered, begun, batch = plan.lower(run, task, sharding.make_mesh(run.mesh))
    assert batch["image"].shape == (8, 224, 224, 3)
    assert ("tokens" in batch) == (targets == "stored")
    assert begun.params["encoder"]["blocks"]["attn"]["qkv"]["kernel"].shape == (2, 3, 768, 768)
    assert "stablehlo" in lowered.as_text()
    assert plan.steps_of(run) == 300 * 1281167 // 8


def test_a_plan_needs_to_know_the_teacher():
    made = schema.default(config.Train)
    made.data.path = "absent"
    with pytest.raises(UserError, match="set config.teacher.width and config.teacher.grid"):
        planned(schema.parse(config.Train, made))


def test_gpus_are_planned_by_arithmetic():
    ended = subprocess.run(
        [sys.executable, "tools/plan.py", B16, "--device=gpu"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "model 153.3 G" in ended.stdout  # research on the paper's recipe: 153
    assert "h200: at most 6451 images/s" in ended.stdout


def params_of(name: str) -> int:
    model = schema.parse(config.Model, {"size": name})
    module = digpt.build(model, out_width=1024)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *digpt.dummy_inputs(model))
    return sum(x.size for x in jax.tree.leaves(shapes))


# A config's pod: what its plan must stay below, and micro-batches, each of which reduces gradients.
PODS = {
    "pretrain_b16_in1k.py:v5e-16": ("v5e:4x4", "B/16", 11.5, 180, 2),
    "pretrain_l14_in1k.py:v5e-64": ("v5e:8x8", "L/14", 13.0, 120, 2),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", PODS)
def test_pods(name):
    topology, size, memory, traffic, micro_batches = PODS[name]
    (found,), _ = planned_by_command(
        f"--config={ROOT / 'configs' / name}", f"--topology={topology}"
    )
    assert found["fits"] and found["hbm_bytes"]["sum"] < memory * GIB
    assert found["moved_bytes"] < traffic * 1e9
    # Kernels do the attention; everything else is seen, and is what the formula says.
    assert 0.95 < found["compiled_flops_an_image"] / found["model_flops_an_image"] <= 1
    # Nothing but the reduction of gradients, in bfloat16: no activation, no weight is gathered.
    assert {c["kind"] for c in found["collectives"]} == {"all-reduce"}
    reduced = sum(c["bytes"] for c in found["collectives"])
    assert reduced == pytest.approx(micro_batches * 2 * params_of(size), rel=0.02)


@pytest.mark.tpu_aot
def test_what_does_not_fit_is_told_what_to_change():
    (found,), message = planned_by_command(
        B16, "--topology=v5e:2x2", *SMALL, "--config.batch_size=4096", code=1
    )
    assert not found["fits"] and found["needed_bytes"] > 15.75 * GIB
    assert message.startswith("error: v5e:2x2 = 4 chips = v5e-4 does not fit: it needs ")
    assert message.count("\n") == 1
    change = message.split(" with ")[1].split()
    assert change == ["--config.accum_steps=2"]
    (fits,), _ = planned_by_command(
        B16, "--topology=v5e:2x2", *SMALL, "--config.batch_size=4096", *change
    )
    assert fits["fits"]


# What docstrings in evals/ say of ImageNet-1K's ViT-H features: bytes of the features of both kinds
# and splits, and bytes beside them, of a chip.
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
    features, beside = EVALUATIONS[name]
    (found,), _ = planned_by_command(
        f"--config={ROOT / 'configs' / file}", f"--topology={topology}", "--width=1280"
    )
    hbm = found["hbm_bytes"]
    assert found["fits"] and hbm["features"] <= features and hbm["temporaries"] <= beside
    assert hbm["sum"] == hbm["features"] + hbm["temporaries"] + hbm["code"]


@pytest.mark.tpu_aot
def test_an_evaluation_that_does_not_fit():
    (found,), message = planned_by_command(
        f"--config={ROOT / 'configs/fewshot_in1k.py'}", "--topology=v5e:2x2", "--width=1280",
        "--examples=14000000", code=1,
    )  # fmt: skip
    assert not found["fits"] and found["needed_bytes"] > 15.75 * GIB
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--topology=v5e:2x2"], ["--width=768", "--device=gpu"], ["--width=768", "--images_a_chip=4"],
     ["--width=768"], ["--width=0", "--topology=v5e:2x2"]],
)  # fmt: skip
def test_flags_of_an_evaluation(words):
    """A width and a topology are needed, and flags of a training mean nothing."""
    config_flag = f"--config={ROOT / 'configs/linear_in1k.py'}"
    reports, message = planned_by_command(config_flag, *words, code=1)
    assert not reports and message.startswith("error: ") and message.count("\n") == 1
