"""Rematerialization: values that the backward pass reads, and values that it recomputes."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from dgpt_jax.distributed import sharding

# "none" saves the results of matrix products and recomputes the operations in between (norms, GELU,
# scores), which is cheaper than writing them to memory and reading them again.
SAVED = "saved"
POLICIES = {
    "none": jax.checkpoint_policies.save_only_these_names(SAVED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def save_for_backward(x: jax.Array) -> jax.Array:
    """Marks a result of a block that policy "none" saves for the backward pass."""
    return checkpoint_name(x, SAVED)


def rematerialized(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Returns the block class under one of POLICIES.

    On GPUs, where blocks are unrolled, XLA merges the recomputation with the forward pass. That is
    welcome under "none", and prevented under the policies that save memory.
    """
    prevent = policy != "none" and sharding.platform() == "gpu"
    return nn.remat(block, policy=POLICIES[policy], prevent_cse=prevent)
