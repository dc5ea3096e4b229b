"""What the backward pass reads, and what it recomputes."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from dgpt_jax import sharding

# "none" keeps what matrix products give and recomputes what lies between them (norms, GELU,
# scores): cheaper than to write it to memory and read it again.
KEPT = "kept"
POLICIES = {
    "none": jax.checkpoint_policies.save_only_these_names(KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def kept(x):
    """Marks a result of a block that the backward pass reads instead of recomputing it."""
    return checkpoint_name(x, KEPT)


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block class under one of POLICIES.

    Where blocks are not in a loop, on GPUs, the compiler sees that something is computed twice and
    keeps it instead: welcome under "none", to be prevented where memory is to be saved.
    """
    prevent = policy != "none" and sharding.platform() == "gpu"
    return nn.remat(block, policy=POLICIES[policy], prevent_cse=prevent)
