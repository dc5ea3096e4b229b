"""Heads that are trained on a frozen encoder: MAE's, DINOv2's and AIM's probes.

Each has a method `train`, which returns logits and a scalar 0 to add to the loss, and a call for
inference. A grid of learning rates is a stack of heads: logits then have a leading axis.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.models import vit


class LinearProbe(nn.Module):
    """BatchNorm without scale and bias (eps 1e-6), then a linear layer: MAE's head on frozen
    features (main_linprobe.py).

    Running statistics are parameters whose gradient, through `train`, is their difference from the
    batch's: a step of plain SGD with rate 0.1 updates them as momentum 0.9 does (torch's 0.1).
    """

    width: int
    num_classes: int
    eps: float = 1e-6

    def setup(self):
        self.running_mean = self.param("running_mean", nn.initializers.zeros, (self.width,))
        self.running_var = self.param("running_var", nn.initializers.ones, (self.width,))
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits (B, classes) of features (B, D) float32, by running statistics."""
        return self._linear(features, self.running_mean, self.running_var)

    def train(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits by the batch's statistics and a scalar 0 to add to the loss."""
        mean, var, running_stats_loss = _batch_stats(features, self.running_mean, self.running_var)
        return self._linear(features, mean, var), running_stats_loss

    def _linear(self, features, mean, var):
        return self.head((features - mean) / jnp.sqrt(var + self.eps))


def _batch_stats(x, running_mean, running_var):
    """Returns mean and variance of the channels of a batch (…, D), and a loss of the running
    statistics: 0, with the gradient running statistics − batch statistics (unbiased variance)."""
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, var = x.mean(axis=axes), x.var(axis=axes)
    unbiased = var * count / max(count - 1, 1)
    running_stats_loss = jnp.zeros(())
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        loss = 0.5 * jnp.square(running - jax.lax.stop_gradient(batch)).sum()
        running_stats_loss += loss - jax.lax.stop_gradient(loss)
    return mean, var, running_stats_loss


def _stack(module: type[nn.Module], count: int):
    """Returns a class of `count` heads on the same features, with parameters (count, …)."""
    return nn.vmap(
        module,
        in_axes=None,  # pyright: ignore[reportArgumentType]  # flax annotates less than it takes
        axis_size=count,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )


class LinearGrid(nn.Module):
    """DINOv2's linear heads (dinov2/eval/linear.py): `count` on each of four kinds of features,
    CLS of the last or the last four blocks, without or with the mean of the last patch tokens."""

    num_classes: int
    count: int

    blocks = 4  # of Classifier.last_block_tokens
    normed = True
    # (name of the parameters, number of last blocks whose CLS is used, mean of patch tokens too)
    kinds = (
        ("blocks1", 1, False), ("blocks1_mean", 1, True),
        ("blocks4", 4, False), ("blocks4_mean", 4, True),
    )  # fmt: skip
    stacks = tuple(kind[0] for kind in kinds)

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (4 · count, B, classes), kind by kind, of normed tokens (4, B, 1+N, D)."""
        mean, logits = tokens[-1, :, 1:].mean(axis=1), []
        for name, blocks, with_mean in self.kinds:
            x = jnp.concatenate([*tokens[-blocks:, :, 0], *[mean] * with_mean], axis=-1)
            dense = _stack(nn.Dense, self.count)
            init = nn.initializers.normal(0.01)
            logits.append(dense(self.num_classes, kernel_init=init, name=name)(x))
        return jnp.concatenate(logits)

    def train(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits and a scalar 0, the interface of all probes."""
        return self(tokens), jnp.zeros(())


class AttentiveHead(nn.Module):
    """Attention pooling by one learned query, then a linear layer, all without bias.

    Source: AttentionPoolingClassifier in AIM's torch/layers.py, after its BatchNorm; neither the
    query nor the result is projected. Initialized as torch's linear layers.
    """

    heads: int
    num_classes: int

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        """Logits (B, classes) of standardized tokens (B, N, D)."""
        batch, _, width = x_BND.shape
        init = vit.patch_bias_init(width)
        split = (width, self.heads, width // self.heads)
        query = self.param("query", nn.initializers.normal(0.02), (width,)).reshape(split[1:])
        key_DHK = self.param("key", init, (width, width)).reshape(split)
        value_DHK = self.param("value", init, (width, width)).reshape(split)
        # With one query, keys and values of the tokens need not be computed: (x K) q = x (K q).
        key_query_DH = jnp.einsum("dhk,hk->dh", key_DHK, query) * split[2] ** -0.5
        weights = nn.softmax(jnp.einsum("bnd,dh->bhn", x_BND, key_query_DH))
        mean_BHD = jnp.einsum("bhn,bnd->bhd", weights, x_BND)
        pooled = jnp.einsum("bhd,dhk->bhk", mean_BHD, value_DHK).reshape(batch, width)
        return nn.Dense(self.num_classes, use_bias=False, kernel_init=init, name="linear")(pooled)


class AttentiveGrid(nn.Module):
    """AIM's attentive probe: `count` AttentiveHeads on the mean of the last six blocks' patch
    tokens, after BatchNorm without scale and bias. Running statistics as in LinearProbe, shared by
    all heads."""

    width: int
    heads: int
    num_classes: int
    count: int
    eps: float = 1e-6

    blocks = 6  # of Classifier.last_block_tokens
    normed = False
    stacks = ("each",)

    def setup(self):
        self.running_mean = self.param("running_mean", nn.initializers.zeros, (self.width,))
        self.running_var = self.param("running_var", nn.initializers.ones, (self.width,))
        self.each = _stack(AttentiveHead, self.count)(self.heads, self.num_classes)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (count, B, classes) of raw tokens (6, B, 1+N, D), by running statistics."""
        return self._logits(self._patches(tokens), self.running_mean, self.running_var)

    def train(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits by the batch's statistics and a scalar 0 to add to the loss."""
        x_BND = self._patches(tokens)
        mean, var, running_stats_loss = _batch_stats(x_BND, self.running_mean, self.running_var)
        return self._logits(x_BND, mean, var), running_stats_loss

    def _patches(self, tokens):
        return tokens[:, :, 1:].mean(axis=0)

    def _logits(self, x_BND, mean, var):
        return self.each((x_BND - mean) / jnp.sqrt(var + self.eps))


def fold_batch_norm(probe: dict, eps: float = LinearProbe.eps) -> dict[str, np.ndarray]:
    """Folds a LinearProbe's statistics into its linear layer: {"kernel", "bias"}."""
    scale = 1 / np.sqrt(probe["running_var"] + eps)
    kernel = probe["head"]["kernel"] * scale[:, None]
    return {"kernel": kernel, "bias": probe["head"]["bias"] - probe["running_mean"] @ kernel}
