"""Heads that are trained on a frozen encoder: MAE's, DINOv2's and AIM's probes.

Each has `train`, which gives logits and a scalar 0 to be added to the loss, and a call, for use. A
grid of learning rates is a stack of heads: logits then have a leading axis.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import vit


class LinearProbe(nn.Module):
    """BatchNorm without scale and bias (eps 1e-6), then a linear layer: MAE's head on frozen
    features (main_linprobe.py).

    Running statistics are parameters whose gradient, from `train`, is what they are minus what the
    batch has: a step of plain SGD with rate 0.1 moves them as momentum 0.9 does (torch's 0.1).
    """

    width: int
    num_classes: int
    eps: float = 1e-6

    def setup(self):
        self.running_mean = self.param("running_mean", nn.initializers.zeros, (self.width,))
        self.running_var = self.param("running_var", nn.initializers.ones, (self.width,))
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

    def __call__(self, features):
        """(B, D) float32 to logits (B, classes), by running statistics."""
        return self._linear(features, self.running_mean, self.running_var)

    def train(self, features):
        """(logits by the batch's statistics, a scalar 0 to be added to the loss)."""
        mean, var, gap = _of_batch(features, self.running_mean, self.running_var)
        return self._linear(features, mean, var), gap

    def _linear(self, features, mean, var):
        return self.head((features - mean) / jnp.sqrt(var + self.eps))


def _of_batch(x, running_mean, running_var):
    """(mean, variance) of the channels of a batch (…, D), and the gap, 0, whose gradient is what
    running statistics are minus these; the variance that is kept is the unbiased one."""
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, var = x.mean(axis=axes), x.var(axis=axes)
    unbiased = var * count / max(count - 1, 1)
    gap = jnp.zeros(())
    for running, seen in ((running_mean, mean), (running_var, unbiased)):
        half = 0.5 * jnp.square(running - jax.lax.stop_gradient(seen)).sum()
        gap += half - jax.lax.stop_gradient(half)
    return mean, var, gap


def _copies(module: type[nn.Module], count: int):
    """`count` heads of a kind on the same features: parameters (count, …), each drawn anew."""
    return nn.vmap(
        module,
        in_axes=None,
        axis_size=count,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )


class LinearGrid(nn.Module):
    """DINOv2's linear heads (dinov2/eval/linear.py): `count` on each of four kinds of features,
    CLS of the last or the last four blocks, without or with the mean of the last patch tokens."""

    num_classes: int
    count: int

    blocks = 4  # of Classifier.last
    normed = True
    # Name, which is that of its parameters; last blocks whose CLS it sees; whether the mean too.
    kinds = (
        ("blocks1", 1, False), ("blocks1_mean", 1, True),
        ("blocks4", 4, False), ("blocks4_mean", 4, True),
    )  # fmt: skip
    stacks = tuple(kind[0] for kind in kinds)

    @nn.compact
    def __call__(self, tokens):
        """Normed tokens (4, B, 1+N, D) to logits (4 · count, B, classes), kind by kind."""
        mean, found = tokens[-1, :, 1:].mean(axis=1), []
        for name, blocks, with_mean in self.kinds:
            x = jnp.concatenate([*tokens[-blocks:, :, 0], *[mean] * with_mean], axis=-1)
            dense = _copies(nn.Dense, self.count)
            init = nn.initializers.normal(0.01)
            found.append(dense(self.num_classes, kernel_init=init, name=name)(x))
        return jnp.concatenate(found)

    def train(self, tokens):
        """(logits, a scalar 0), as the other probes have it."""
        return self(tokens), jnp.zeros(())


class AttentiveHead(nn.Module):
    """One learned query attends to tokens, and a linear layer to what it gets; no bias anywhere.

    Source: AttentionPoolingClassifier in AIM's torch/layers.py, behind its BatchNorm; there is no
    projection of the query nor of the result. Initial values are torch's of a linear layer.
    """

    heads: int
    num_classes: int

    @nn.compact
    def __call__(self, x_BND):
        """Standardised tokens (B, N, D) to logits (B, classes)."""
        batch, _, width = x_BND.shape
        init = vit.patch_bias_init(width)
        split = (width, self.heads, width // self.heads)
        query = self.param("query", nn.initializers.normal(0.02), (width,)).reshape(split[1:])
        key_DHK = self.param("key", init, (width, width)).reshape(split)
        value_DHK = self.param("value", init, (width, width)).reshape(split)
        # There is one query, so keys and values of all tokens need not be made: (x K) q = x (K q).
        towards_DH = jnp.einsum("dhk,hk->dh", key_DHK, query) * split[2] ** -0.5
        weights = nn.softmax(jnp.einsum("bnd,dh->bhn", x_BND, towards_DH))
        seen_BHD = jnp.einsum("bhn,bnd->bhd", weights, x_BND)
        pooled = jnp.einsum("bhd,dhk->bhk", seen_BHD, value_DHK).reshape(batch, width)
        return nn.Dense(self.num_classes, use_bias=False, kernel_init=init, name="linear")(pooled)


class AttentiveGrid(nn.Module):
    """`count` AttentiveHeads on the mean of the last six blocks' patch tokens, which BatchNorm
    without scale and bias standardises: AIM's attentive probe. Running statistics as in
    LinearProbe; all heads have the same ones."""

    width: int
    heads: int
    num_classes: int
    count: int
    eps: float = 1e-6

    blocks = 6  # of Classifier.last
    normed = False
    stacks = ("each",)

    def setup(self):
        self.running_mean = self.param("running_mean", nn.initializers.zeros, (self.width,))
        self.running_var = self.param("running_var", nn.initializers.ones, (self.width,))
        self.each = _copies(AttentiveHead, self.count)(self.heads, self.num_classes)

    def __call__(self, tokens):
        """Raw tokens (6, B, 1+N, D) to logits (count, B, classes), by running statistics."""
        return self._logits(self._patches(tokens), self.running_mean, self.running_var)

    def train(self, tokens):
        """(logits by the batch's statistics, a scalar 0 to be added to the loss)."""
        x_BND = self._patches(tokens)
        mean, var, gap = _of_batch(x_BND, self.running_mean, self.running_var)
        return self._logits(x_BND, mean, var), gap

    def _patches(self, tokens):
        return tokens[:, :, 1:].mean(axis=0)

    def _logits(self, x_BND, mean, var):
        return self.each((x_BND - mean) / jnp.sqrt(var + self.eps))


def fold(probe: dict, eps: float = LinearProbe.eps) -> dict:
    """The plain linear head, {"kernel", "bias"}, that is a LinearProbe's parameters in use."""
    scale = 1 / np.sqrt(probe["running_var"] + eps)
    kernel = probe["head"]["kernel"] * scale[:, None]
    return {"kernel": kernel, "bias": probe["head"]["bias"] - probe["running_mean"] @ kernel}
