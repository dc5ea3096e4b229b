"""Batch, micro-batches, recomputation, sharding and epochs by images and devices."""

import pytest

from dgpt_jax.config import ModelConfig, schema
from dgpt_jax.errors import UserError
from dgpt_jax.planning import training_choice
from dgpt_jax.planning.chips import GIB
from dgpt_jax.planning.training_choice import Devices

WIDTH = 1024  # of a teacher's token


def model(size: str) -> ModelConfig:
    return schema.parse(ModelConfig, {"size": size})


def gpus(count: int, gib: float) -> Devices:
    return Devices("gpu", "NVIDIA H200", count, int(gib * GIB))


@pytest.mark.parametrize(
    "size,batch,remat,gigabytes",
    [
        ("B/16", 256, 1, 26.1), ("S/16", 512, 1, 35.2), ("L/14", 128, 1, 34.4),
        ("B/16", 256, training_choice.FULL_REMAT, 10.8),
    ],
)  # fmt: skip
def test_memory_is_that_of_the_measured_steps(size, batch, remat, gigabytes):
    """docs/results/gpu.md."""
    one = training_choice.activation_bytes(model(size), dtype="bfloat16", kernels=True)
    state = training_choice.STATE_BYTES * sum(training_choice.parameters(model(size), WIDTH))
    assert (state + batch * remat * one) / 1e9 == pytest.approx(gigabytes, rel=0.06)


def test_the_number_of_parameters():
    """Of the modules themselves, to 3 %: without biases, norms and positions."""
    import jax

    from dgpt_jax.models import digpt

    config = model("S/16")
    module = digpt.build(config, out_width=WIDTH, decoders=("next", "visible"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *digpt.dummy_inputs(config))
    exact = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sum(training_choice.parameters(config, WIDTH)) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    "devices,images,requested,batch,accum,remat,fsdp",
    [
        (gpus(1, 120), 1_281_167, None, 4096, 4, "none", 1),
        (gpus(1, 12), 10_000, None, 256, 4, "none", 1),
        (gpus(1, 4), 10_000, None, 256, 16, "full", 1),
        (gpus(8, 24), 10_000, None, 256, 1, "none", 1),
        (gpus(3, 24), 10_000, None, 255, 1, "none", 1),
        (gpus(1, 120), 300, None, 64, 1, "none", 1),
        (gpus(1, 120), 300, 4096, 256, 1, "none", 1),  # more than there are
        (gpus(1, 120), 300, 100, 100, 1, "none", 1),
        (gpus(1, 120), 8, None, 8, 1, "none", 1),
        (Devices("cpu", "cpu", 1, 16 * GIB), 300, None, 64, 2, "none", 1),
    ],
)
def test_choices(devices, images, requested, batch, accum, remat, fsdp):
    choice = training_choice.choose(model("B/16"), devices, images, WIDTH, requested)
    assert (choice.batch, choice.accum_steps, choice.remat, choice.fsdp) == (
        batch, accum, remat, fsdp,
    )  # fmt: skip
    assert choice.dtype == ("float32" if devices.platform == "cpu" else "bfloat16")
    assert choice.micro_batch % devices.count == 0 and choice.batch <= images
    assert f"batch {batch}" in choice.lines[1]


def test_parameters_are_sharded_where_they_do_not_fit():
    choice = training_choice.choose(model("H/14"), gpus(8, 12), 10_000, WIDTH)
    assert choice.fsdp == 8 and training_choice.as_dict(choice)["mesh.fsdp"] == 8


@pytest.mark.parametrize(
    "size,devices,batch,text",
    [
        ("H/14", gpus(1, 8), None, "--size"),
        ("B/16", gpus(8, 24), 100, "--batch=100"),
        ("B/16", gpus(400, 24), None, "400 devices"),
    ],
)
def test_refusals(size, devices, batch, text):
    with pytest.raises(UserError) as refused:
        training_choice.choose(model(size), devices, 300, WIDTH, batch)
    assert text in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "images,batch,epochs",
    [(1_281_167, 4096, 100), (10_000, 256, 256), (300, 64, 800), (60_000, 1024, 171)],
)
def test_epochs(images, batch, epochs):
    assert training_choice.default_batch(images) == batch
    assert training_choice.default_epochs(images, batch) == epochs
