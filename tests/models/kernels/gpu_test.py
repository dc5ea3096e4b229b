"""What is done on GPUs alone, as far as a CPU can show it: kernels interpreted, a step traced."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax import attention_gpu, digpt, kernel_check, norm_gpu, sharding, transformer
from dgpt_jax.config import Mesh
from tests.data import tiny_model
from tests.processes import on_devices


def norm_inputs(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x = 3 * jax.random.normal(keys[0], shape) + 1
    scale, bias = jax.random.normal(keys[1], (2, shape[-1]))
    return x, scale, bias, jax.random.normal(keys[2], shape)


@pytest.mark.parametrize("shape", [(5, 7, 80), (6, 24)])
def test_layer_norm_is_that_of_flax(shape):
    x, scale, bias, gradient = norm_inputs(shape)
    flax = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)

    def expected(x, scale, bias):
        return flax.apply({"params": {"scale": scale, "bias": bias}}, x)

    own = partial(transformer.normalised, eps=1e-6, dtype=jnp.float32)
    out, pull = jax.vjp(lambda *args: own(*args), x, scale, bias)
    expected_out, expected_pull = jax.vjp(expected, x, scale, bias)
    np.testing.assert_allclose(out, expected_out, atol=1e-6)
    for a, b in zip(pull(gradient), expected_pull(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 3])
def test_norm_kernel_gives_the_gradients(rows, monkeypatch):
    """35 rows over three programs, the last of which runs out of them."""
    monkeypatch.setattr(norm_gpu, "PROGRAMS", 3)
    monkeypatch.setattr(norm_gpu, "ROWS", rows)
    x, scale, bias, gradient = norm_inputs((5, 7, 80))
    _, pull = jax.vjp(lambda *a: transformer.normalised(*a, 1e-6, jnp.float32), x, scale, bias)
    d_x, *parts = norm_gpu.backward(x, gradient, scale, 1e-6, interpret=True)
    found = d_x, *(part.sum(axis=0) for part in parts)
    for a, b in zip(found, pull(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def norm_on_a_mesh():
    """Each device has its own examples, and the parts of all are added up."""
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=1, tensor=2))
    x, scale, bias, gradient = jax.device_put(norm_inputs((4, 7, 80)), sharding.replicated(mesh))

    def results(x, scale, bias, gradient):
        _, pull = jax.vjp(lambda *a: transformer.normalised(*a, 1e-6, jnp.float32), x, scale, bias)
        return pull(gradient)

    expected = results(x, scale, bias, gradient)
    sharding.platform = lambda: "gpu"
    norm_gpu.backward = partial(norm_gpu.backward, interpret=True)
    norm_gpu.PROGRAMS = 2
    found = jax.jit(sharding.on_mesh(results, mesh))(x, scale, bias, gradient)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_norm_kernel_on_a_mesh():
    on_devices(4, norm_on_a_mesh)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Traced under a mesh, the model takes the ways of GPUs; kernels are interpreted."""
    real = sharding.platform
    monkeypatch.setattr(sharding, "platform", lambda: real() and "gpu")
    monkeypatch.setattr(attention_gpu, "fused", partial(attention_gpu.fused, interpret=True))
    monkeypatch.setattr(norm_gpu, "backward", partial(norm_gpu.backward, interpret=True))
    monkeypatch.setattr(norm_gpu, "PROGRAMS", 2)


def loss_of(remat: str, dtype):
    """(loss, params) of a small model; the loss is to be traced anew for each way."""
    model = tiny_model(remat=remat, decoder_depth=1)
    module = digpt.build(model, out_width=8, dtype=dtype, decoders=("next",))
    images, order = digpt.dummy_inputs(model)
    images = jax.random.normal(jax.random.key(0), images.shape)
    params = module.init(jax.random.key(1), images, order)["params"]

    def loss(params):
        predictions = module.apply({"params": params}, images, order)
        return sum(jnp.tanh(x).mean() for x in predictions.values())

    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    return jax.jit(sharding.on_mesh(jax.value_and_grad(loss), mesh)), params


def gradients(dtype):
    step, params = loss_of("none", dtype)
    return step(params)


@pytest.mark.slow
def test_a_model_is_the_same_on_a_gpu(request):
    """In bfloat16, which the attention kernels are for: as near to float32 as XLA's way is."""
    exact, exact_grads = gradients(jnp.float32)
    value, grads = gradients(jnp.bfloat16)
    request.getfixturevalue("as_on_a_gpu")
    there, there_grads = gradients(jnp.bfloat16)
    assert abs(there - exact) <= 2 * abs(value - exact) + 1e-4
    assert distance(there_grads, exact_grads) < 1.5 * distance(grads, exact_grads)
    assert distance(there_grads, grads) > 0  # the other way was taken


@pytest.mark.parametrize("remat,barriers", [("none", False), ("dots", True), ("full", True)])
def test_unrolled_blocks_save_memory_where_they_should(remat, barriers, as_on_a_gpu):
    step, params = loss_of(remat, jnp.bfloat16)
    assert ("optimization_barrier" in step.lower(params).as_text()) == barriers


def test_the_kernels_check_finds_what_is_wrong(as_on_a_gpu, monkeypatch):
    """As tools/doctor.py runs it on an accelerator."""
    for name, value in {"BATCH": 1, "WIDTH": 64, "TOKENS": 4, "REPEATS": 2}.items():
        monkeypatch.setattr(kernel_check, name, value)
    found = kernel_check.kernels()
    assert [finding.level for finding in found] == ["ok"] * 3, found
    right = norm_gpu.backward
    monkeypatch.setattr(norm_gpu, "backward", lambda *args: tuple(1.02 * x for x in right(*args)))
    monkeypatch.setattr(attention_gpu, "LOG2E", 1.5)
    found = kernel_check.kernels()
    assert [finding.level for finding in found] == ["fail"] * 3, found


def test_kernels_that_race_are_found():
    found = kernel_check.judge("attention", 1e-3, same=False)
    assert found.level == "fail" and "every time" in str(found)


def distance(a, b) -> float:
    """‖a − b‖ / ‖b‖ of two trees."""
    flat = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1]))
