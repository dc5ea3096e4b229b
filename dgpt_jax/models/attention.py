"""Attention over short sequences, all heads side by side, whose scores never leave the chip.

An image has few tokens: 148 in pretraining B/16. On TPUs, and in bfloat16 on GPUs, kernels of ours
do it (attention_tpu.py, attention_gpu.py), elsewhere XLA.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from dgpt_jax import attention_gpu, attention_tpu, sharding
from dgpt_jax.remat import kept

# Tokens of which a TPU's scores of a head, four times in float32, still fit beside the rest, and
# which a GPU's kernel passes over in straight lines.
LONGEST = 640
MASKED = -1e30  # far below any score, and finite, so that nothing becomes NaN


def attend(projections: Sequence[jax.Array], head_width: int, mask_NM=None) -> jax.Array:
    """softmax(q kᵀ / √K) v of every head, softmax in float32: (B, N, D), and `kept`.

    projections: q, k and v, stacked in one array (3, B, N, D) or in two, (1, B, N, D) and
    (2, B, M, D); a head is `head_width` neighbours of the last axis. mask: bool (N, M), who (row)
    may attend to whom (column).
    """
    projections = tuple(projections)
    platform = sharding.platform()
    if max(stacked.shape[2] for stacked in projections) > LONGEST:
        platform = None
    if platform == "gpu" and projections[0].dtype == jnp.bfloat16:
        return attention_gpu.fused(projections, mask_NM, head_width=head_width)
    if platform == "tpu":
        bias = () if mask_NM is None else (jnp.where(mask_NM, 0.0, MASKED),)
        kernel = partial(attention_tpu.fused, head_width=head_width)
        return kept(sharding.per_shard(kernel, projections, bias, projections[0][0]))
    return kept(reference(projections, head_width, mask_NM))


def reference(projections, head_width: int, mask_NM=None):
    """`attend` by XLA."""
    q, k, v = (x.reshape(*x.shape[:2], -1, head_width) for stacked in projections for x in stacked)
    mask = None if mask_NM is None else jnp.asarray(mask_NM)[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(*q.shape[:2], -1)
