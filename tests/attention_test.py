"""The attention kernels against XLA's attention, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dgpt_jax import attention, segments, sharding
from dgpt_jax.config import Mesh
from tests.processes import on_devices


def inputs(parts, batch, queries, keys, width):
    """Stacked projections, and a gradient of the result."""
    draw = iter(jax.random.split(jax.random.key(0), len(parts) + 1))
    lengths = (queries,) if len(parts) == 1 else (queries, keys)
    arrays = [jax.random.normal(next(draw), (p, batch, n, width)) for p, n in zip(parts, lengths)]
    return tuple(arrays), jax.random.normal(next(draw), (batch, queries, width))


def assert_same(function, expected, projections, gradient):
    out, pull = jax.vjp(function, projections)
    expected_out, expected_pull = jax.vjp(expected, projections)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    for a, b in zip(pull(gradient)[0], expected_pull(gradient)[0], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "parts,queries,keys,heads,head_width",
    [((3,), 49, 49, 4, 64), ((1, 2), 13, 20, 8, 32), ((3,), 17, 17, 3, 24), ((3,), 9, 9, 16, 80)],
)  # whole registers of 2 and 4 heads; a width that is no multiple of 128; ViT-H's heads
@pytest.mark.parametrize("masked", [True, False])
def test_kernels_are_attention(parts, queries, keys, heads, head_width, masked):
    projections, gradient = inputs(parts, 2, queries, keys, heads * head_width)
    mask, bias = None, ()
    if masked:
        mask = np.tril(np.ones((queries, keys), bool))
        bias = (jnp.where(mask, 0.0, attention.MASKED),)
    kernel = partial(attention.fused, bias=bias, head_width=head_width, interpret=True)
    expected = partial(attention.reference, head_width=head_width, mask_NM=mask)
    assert_same(kernel, expected, projections, gradient)


def on_a_mesh():
    """Each device runs the kernel on its own examples and heads."""
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    projections, gradient = inputs((1, 2), 8, 9, 9, 64)
    projections, gradient = jax.device_put((projections, gradient), sharding.replicated(mesh))
    mask = segments.attention_mask(2, 4)
    function = partial(attention.attend, head_width=16, mask_NM=mask)
    attend = jax.jit(sharding.on_mesh(lambda p: function(p), mesh))
    expected = partial(attention.reference, head_width=16, mask_NM=mask)
    sharding.on_tpu = lambda: True
    with pltpu.force_tpu_interpret_mode():
        assert "shard_map" in str(jax.make_jaxpr(attend)(projections))
        assert_same(attend, expected, projections, gradient)


def test_kernels_on_a_mesh():
    on_devices(8, on_a_mesh)
