"""GPU code paths on a CPU: interpreted kernels, traced steps."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax.config import MeshConfig
from dgpt_jax.distributed import sharding
from dgpt_jax.models import digpt, transformer
from dgpt_jax.models.kernels import attention_gpu, kernel_check, layer_norm_gpu
from tests.support.data import tiny_model
from tests.support.processes import on_devices


def norm_inputs(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x = 3 * jax.random.normal(keys[0], shape) + 1
    scale, bias = jax.random.normal(keys[1], (2, shape[-1]))
    return x, scale, bias, jax.random.normal(keys[2], shape)


@pytest.mark.parametrize("shape", [(5, 7, 80), (6, 24)])
def test_layer_norm_matches_flax(shape):
    x, scale, bias, gradient = norm_inputs(shape)
    flax = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)

    def expected(x, scale, bias):
        return flax.apply({"params": {"scale": scale, "bias": bias}}, x)

    norm = partial(transformer.layer_norm, eps=1e-6, dtype=jnp.float32)
    out, vjp = jax.vjp(lambda *args: norm(*args), x, scale, bias)
    expected_out, expected_vjp = jax.vjp(expected, x, scale, bias)
    np.testing.assert_allclose(out, expected_out, atol=1e-6)
    for a, b in zip(vjp(gradient), expected_vjp(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 3])
def test_layer_norm_kernel(rows, monkeypatch):
    """35 rows over three programs, the last of which has fewer rows."""
    monkeypatch.setattr(layer_norm_gpu, "PROGRAMS", 3)
    monkeypatch.setattr(layer_norm_gpu, "ROWS", rows)
    x, scale, bias, gradient = norm_inputs((5, 7, 80))
    _, vjp = jax.vjp(lambda *a: transformer.layer_norm(*a, 1e-6, jnp.float32), x, scale, bias)
    d_x, *partial_sums = layer_norm_gpu.backward(x, gradient, scale, 1e-6, interpret=True)
    grads = d_x, *(sums.sum(axis=0) for sums in partial_sums)
    for a, b in zip(grads, vjp(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def norm_on_a_mesh():
    """Each device has its own examples; the partial sums of all devices are added."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    x, scale, bias, gradient = jax.device_put(norm_inputs((4, 7, 80)), sharding.replicated(mesh))

    def results(x, scale, bias, gradient):
        _, vjp = jax.vjp(lambda *a: transformer.layer_norm(*a, 1e-6, jnp.float32), x, scale, bias)
        return vjp(gradient)

    expected = results(x, scale, bias, gradient)
    sharding.platform = lambda: "gpu"
    layer_norm_gpu.backward = partial(layer_norm_gpu.backward, interpret=True)
    layer_norm_gpu.PROGRAMS = 2
    grads = jax.jit(sharding.on_mesh(results, mesh))(x, scale, bias, gradient)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_layer_norm_kernel_on_a_mesh():
    on_devices(4, norm_on_a_mesh)


def loss_of(remat: str, dtype):
    """(step, params) of a small model; a new step, so that it is traced anew."""
    model = tiny_model(remat=remat, decoder_depth=1)
    module = digpt.build(model, out_width=8, dtype=dtype, decoders=("next",))
    images, order = digpt.dummy_inputs(model)
    images = jax.random.normal(jax.random.key(0), images.shape)
    params = module.init(jax.random.key(1), images, order)["params"]

    def loss(params):
        predictions = module.apply({"params": params}, images, order)
        return sum(jnp.tanh(x).mean() for x in predictions.values())

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return jax.jit(sharding.on_mesh(jax.value_and_grad(loss), mesh)), params


def gradients(dtype):
    step, params = loss_of("none", dtype)
    return step(params)


@pytest.mark.slow
def test_a_model_is_the_same_on_a_gpu(request):
    """In bfloat16, which the attention kernels require: as close to float32 as XLA."""
    exact, exact_grads = gradients(jnp.float32)
    value, grads = gradients(jnp.bfloat16)
    request.getfixturevalue("as_on_a_gpu")
    gpu_value, gpu_grads = gradients(jnp.bfloat16)
    assert abs(gpu_value - exact) <= 2 * abs(value - exact) + 1e-4
    assert distance(gpu_grads, exact_grads) < 1.5 * distance(grads, exact_grads)
    assert distance(gpu_grads, grads) > 0  # the kernels ran


SLOW = [
    pytest.param("none", False, marks=pytest.mark.slow),
    pytest.param("full", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("remat,barriers", [("dots", True), *SLOW])
def test_unrolled_blocks_recompute_under_memory_saving_policies(remat, barriers, as_on_a_gpu):
    step, params = loss_of(remat, jnp.bfloat16)
    assert ("optimization_barrier" in step.lower(params).as_text()) == barriers


@pytest.mark.slow
def test_the_check_detects_wrong_kernels(small_check, monkeypatch):
    """As tools/doctor.py runs it on an accelerator."""
    rows = kernel_check.deviations()
    assert [row.ok for row in rows] == [True] * 3, rows
    backward = layer_norm_gpu.backward
    monkeypatch.setattr(
        layer_norm_gpu, "backward", lambda *args: tuple(1.02 * x for x in backward(*args))
    )
    monkeypatch.setattr(attention_gpu, "LOG2E", 1.5)
    rows = kernel_check.deviations()
    assert [row.ok for row in rows] == [False] * 3, rows


def test_the_check_detects_a_race():
    racing = kernel_check.Deviation("attention", 1e-3, deterministic=False)
    assert not racing.ok and "differs between runs" in str(racing)


def distance(a, b) -> float:
    """‖a − b‖ / ‖b‖ of two trees."""
    flat = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1]))
