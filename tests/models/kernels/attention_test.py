"""The attention kernels for TPUs and GPUs compared with XLA's, forward and backward."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dgpt_jax.config import MeshConfig
from dgpt_jax.data import segments
from dgpt_jax.distributed import sharding
from dgpt_jax.models import attention, remat
from dgpt_jax.models.kernels import attention_gpu, attention_tpu
from tests.support.processes import on_devices


def inputs(stacks, batch, queries, keys, width):
    """Stacked projections, and a gradient of the result."""
    rngs = iter(jax.random.split(jax.random.key(0), len(stacks) + 1))
    lengths = (queries,) if len(stacks) == 1 else (queries, keys)
    arrays = [jax.random.normal(next(rngs), (p, batch, n, width)) for p, n in zip(stacks, lengths)]
    return tuple(arrays), jax.random.normal(next(rngs), (batch, queries, width))


def assert_same(function, expected, projections, gradient, mesh=None):
    def results(function, projections, gradient):
        out, vjp = jax.vjp(function, projections)
        return out, *vjp(gradient)[0]

    compute = partial(results, function)
    if mesh is not None:
        compute = jax.jit(sharding.on_mesh(compute, mesh))
    out, *grads = compute(projections, gradient)
    expected_out, *expected_grads = results(expected, projections, gradient)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


SHAPES = pytest.mark.parametrize(
    "stacks,queries,keys,heads,head_width",
    [((3,), 49, 49, 4, 64), ((1, 2), 13, 20, 8, 32), ((3,), 17, 17, 3, 24), ((3,), 9, 9, 16, 80)],
)  # full registers of 2 and 4 heads; a width that is no multiple of 128; ViT-H's heads


@SHAPES
@pytest.mark.parametrize("masked", [True, False])
def test_tpu_kernels_compute_attention(stacks, queries, keys, heads, head_width, masked):
    projections, gradient = inputs(stacks, 2, queries, keys, heads * head_width)
    mask, bias = None, ()
    if masked:
        mask = np.tril(np.ones((queries, keys), bool))
        bias = (jnp.where(mask, 0.0, attention.MASKED),)
    kernel = partial(attention_tpu.fused, bias=bias, head_width=head_width, interpret=True)
    expected = partial(attention.reference, head_width=head_width, mask_NM=mask)
    assert_same(kernel, expected, projections, gradient)


@SHAPES
@pytest.mark.parametrize("masked", [True, False])
def test_gpu_kernels_compute_attention(stacks, queries, keys, heads, head_width, masked):
    projections, gradient = inputs(stacks, 2, queries, keys, heads * head_width)
    mask = np.tril(np.ones((queries, keys), bool)) if masked else None
    check_on_gpu(projections, gradient, head_width, mask)


@pytest.mark.parametrize(
    "cls_mask", ["all", *(pytest.param(x, marks=pytest.mark.slow) for x in ("official", "self"))]
)
def test_gpu_kernels_over_several_tiles_and_blocks(cls_mask):
    """The mask of pretraining: 148 tokens are 3 tiles, and blocks of 128 and 32, or 5 of 32."""
    mask = segments.attention_mask(3, 49, cls_mask)
    assert attention_gpu.split_blocks(148, 128) == [(0, 128), (128, 32)]
    projections, gradient = inputs((3,), 1, 148, 148, 2 * 32)
    check_on_gpu(projections, gradient, 32, mask)
    projections, gradient = inputs((1, 2), 1, 70, 148, 2 * 32)
    check_on_gpu(projections, gradient, 32, mask[:70])


def check_on_gpu(projections, gradient, head_width, mask):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    kernel = partial(attention_gpu.fused, head_width=head_width, mask_NM=mask, interpret=True)
    expected = partial(attention.reference, head_width=head_width, mask_NM=mask)
    assert_same(kernel, expected, projections, gradient, mesh)


def test_gpu_kernels_lower_to_triton():
    """Without a GPU; docs/results has the checks of their results on one."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    mask = segments.attention_mask(3, 49)

    @jax.jit
    @partial(sharding.on_mesh, mesh=mesh)
    def step(projections):
        return jax.grad(
            lambda p: attention_gpu.fused(p, mask, head_width=64).astype(jnp.float32).sum()
        )(projections)

    projections = (jax.ShapeDtypeStruct((3, 2, 148, 128), jnp.bfloat16),)
    text = step.trace(projections).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_the_backward_pass_does_not_repeat_the_forward_kernel():
    """remat "none" saves the result of attention and the sums."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    @partial(jax.checkpoint, policy=remat.POLICIES["none"])
    def block(p):
        return jnp.sin(attention_gpu.fused((jnp.sin(p),), head_width=32)).sum()

    text = str(jax.make_jaxpr(sharding.on_mesh(jax.grad(block), mesh))(jnp.ones((3, 1, 9, 32))))
    assert (text.count("name=forward"), text.count("name=backward")) == (1, 1)


def on_a_mesh(platform):
    """Each device runs the kernel on its own examples and heads."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    projections, gradient = inputs((1, 2), 8, 9, 9, 64)
    projections, gradient = jax.device_put((projections, gradient), sharding.replicated(mesh))
    mask = segments.attention_mask(2, 4)
    attend = {"tpu": attention.attend, "gpu": partial(attention_gpu.fused, interpret=True)}[
        platform
    ]
    attend = partial(attend, head_width=16, mask_NM=mask)
    expected = partial(attention.reference, head_width=16, mask_NM=mask)
    sharding.platform = lambda: platform
    interpreted = pltpu.force_tpu_interpret_mode if platform == "tpu" else contextlib.nullcontext
    with interpreted():
        assert "shard_map" in str(jax.make_jaxpr(sharding.on_mesh(attend, mesh))(projections))
        assert_same(attend, expected, projections, gradient, mesh)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_kernels_on_a_mesh(platform):
    on_devices(8, on_a_mesh, platform)
