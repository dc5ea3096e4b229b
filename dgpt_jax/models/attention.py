"""Attention over short sequences, with all heads side by side along the last axis.

An image has few tokens: 148 in pretraining B/16. On TPUs, and in bfloat16 on GPUs, our kernels keep
the scores in on-chip memory (attention_tpu.py, attention_gpu.py); elsewhere XLA computes attention.
kernels/selection.py holds another choice.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.models.kernels import attention_gpu, attention_tpu, selection
from dgpt_jax.models.remat import save_for_backward

# Up to this many tokens, a head's scores, four times in float32, fit in a TPU's on-chip memory
# beside the rest, and the GPU kernel unrolls its loop over them.
MAX_TOKENS = 640
MASKED = -1e30  # far below any score, and finite, so that nothing becomes NaN


def attend(
    projections: Sequence[jax.Array], head_width: int, mask_NM: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Returns softmax(q kᵀ / √K) v of every head, (B, N, D), softmax in float32.

    projections: q, k and v, stacked in one array (3, B, N, D) or in two, (1, B, N, D) and
    (2, B, M, D); a head is `head_width` neighbors of the last axis. mask: bool (N, M), True where a
    query (row) attends to a key (column). The result is saved for the backward pass. Raises
    UserError if the selected kernels cannot compute it.
    """
    projections = tuple(projections)
    platform, implementation = sharding.platform(), selection.implementation()
    lengths = [stacked.shape[2] for stacked in projections]
    if platform == "gpu" and projections[0].dtype != jnp.bfloat16:
        platform = None  # neither cuDNN nor our kernel takes float32
    if platform == "gpu" and implementation == "cudnn":
        if mask_NM is not None and any(length % 2 for length in lengths):
            raise UserError(
                f"config.kernels=cudnn: cuDNN has no masked attention over an odd number of tokens "
                f"({max(lengths)}): use kernels=xla or auto"
            )
        return save_for_backward(reference(projections, head_width, mask_NM, "cudnn"))
    if implementation == "ours" and max(lengths) <= MAX_TOKENS:
        if platform == "gpu":
            return attention_gpu.fused(projections, mask_NM, head_width=head_width)
        if platform == "tpu":
            bias = () if mask_NM is None else (jnp.where(mask_NM, 0.0, MASKED),)
            kernel = partial(attention_tpu.fused, head_width=head_width)
            return save_for_backward(
                sharding.shard_map_heads(kernel, projections, bias, projections[0][0])
            )
    return save_for_backward(reference(projections, head_width, mask_NM))


def reference(
    projections: Sequence[jax.Array],
    head_width: int,
    mask_NM: jax.typing.ArrayLike | None = None,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
    """Returns what `attend` does, from JAX's own attention, by XLA or cuDNN."""
    q, k, v = (x.reshape(*x.shape[:2], -1, head_width) for stacked in projections for x in stacked)
    mask = None if mask_NM is None else jnp.asarray(mask_NM)[None, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return out.reshape(*q.shape[:2], -1)
