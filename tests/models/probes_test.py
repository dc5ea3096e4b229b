"""The heads of the probes, compared with torch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax.models import classifier, probes
from dgpt_jax.weights import api
from tests.support.classifying import DEEP, untrained
from tests.support.data import tiny_model


def test_batch_norm_is_torchs():
    """Logits in training and inference, and running statistics after two steps."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    norm = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    module = probes.LinearProbe(5, 2)
    params = module.init(jax.random.key(0), np.zeros((1, 5), np.float32))["params"]
    kernel = np.asarray(params["head"]["kernel"])
    for _ in range(2):
        features = (rng.standard_normal((7, 5)) * 3 + 1).astype(np.float32)

        def loss(params, features=features):
            logits, running_stats_loss = module.apply({"params": params}, features, method="train")
            return running_stats_loss, (logits, running_stats_loss)

        grads, (logits, running_stats_loss) = jax.grad(loss, has_aux=True)(params)
        assert float(running_stats_loss) == 0 and not np.any(grads["head"]["kernel"])
        expected = norm(torch.tensor(features)).numpy() @ kernel
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        for name in ("running_mean", "running_var"):
            params[name] = params[name] - 0.1 * grads[name]
            np.testing.assert_allclose(params[name], getattr(norm, name).numpy(), rtol=1e-5)
    norm.eval()
    logits = module.apply({"params": params}, features)
    np.testing.assert_allclose(logits, norm(torch.tensor(features)).numpy() @ kernel, atol=1e-5)
    folded = probes.fold_batch_norm(jax.tree.map(np.asarray, params))
    np.testing.assert_allclose(logits, features @ folded["kernel"] + folded["bias"], atol=1e-5)


def test_tokens_of_the_last_blocks(tmp_path):
    """They are those of a shallower encoder and, after the norm, of `tokens`."""
    encoder = api.load_encoder(untrained(tmp_path / "a.safetensors", "cls", **DEEP))
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    module = classifier.classifier(encoder.model, "cls")

    @jax.jit
    def outputs(params):
        params = {"params": params}
        last = [
            module.apply(params, images, 4, normed, method="last_block_tokens")
            for normed in (False, True)
        ]
        return *last, module.apply(params, images, method="tokens")

    tokens, normed, expected = outputs(encoder.params)
    assert tokens.shape == normed.shape == (4, 2, 17, 24)
    np.testing.assert_allclose(normed[-1], expected, atol=1e-5)
    blocks = jax.tree.map(lambda x: x[:3], encoder.params["encoder"]["blocks"])
    shorter = encoder.params | {"encoder": encoder.params["encoder"] | {"blocks": blocks}}
    three = classifier.classifier(tiny_model(depth=3), "mean")
    expected = jax.jit(lambda p: three.apply({"params": p}, images, method="tokens"))(shorter)
    np.testing.assert_allclose(tokens[0], expected, atol=1e-5)
    centered = tokens - tokens.mean(axis=-1, keepdims=True)
    expected = centered / np.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-6)
    expected = expected * encoder.params["norm"]["scale"] + encoder.params["norm"]["bias"]
    np.testing.assert_allclose(normed, expected, atol=1e-4)


def test_dinov2_probe_features():
    """CLS of one or four blocks, then the mean of the last patch tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 3, 5, 6)).astype(np.float32)
    module = probes.LinearGrid(num_classes=7, count=2)
    params = module.init(jax.random.key(0), tokens)["params"]
    widths = {"blocks1": 6, "blocks1_mean": 12, "blocks4": 24, "blocks4_mean": 30}
    assert {n: p["kernel"].shape for n, p in params.items()} == {
        name: (2, width, 7) for name, width in widths.items()
    }
    params = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
    logits = module.apply({"params": params}, tokens)
    one, mean = tokens[3, :, 0], tokens[3, :, 1:].mean(axis=1)
    four = np.concatenate([tokens[i, :, 0] for i in range(4)], axis=1)
    features = (one, np.hstack([one, mean]), four, np.hstack([four, mean]))
    expected = [
        x @ params[name]["kernel"][i] + params[name]["bias"][i]
        for name, x in zip(widths, features, strict=True)
        for i in range(2)
    ]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_attentive_head_is_aims():
    """Batch statistics, logits and gradients are those of torch with explicit keys and values."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    blocks = (rng.standard_normal((6, 3, 5, 8)) * 2 + 1).astype(np.float32)
    module = probes.AttentiveGrid(width=8, heads=2, num_classes=4, count=2)
    params = module.init(jax.random.key(0), blocks)["params"]
    assert np.abs(params["each"]["key"]).max() <= 8**-0.5 and params["each"]["query"].std() < 0.05
    each = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params["each"])
    params = params | {"each": each}
    weights = rng.standard_normal((2, 3, 4)).astype(np.float32)

    def loss(params):
        logits, running_stats_loss = module.apply({"params": params}, blocks, method="train")
        return (logits * weights).sum() + running_stats_loss, logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    norm = torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
    x = norm(torch.tensor(blocks[:, :, 1:].mean(axis=0)).transpose(1, 2)).transpose(1, 2)
    for i in range(2):
        leaves = {n: torch.tensor(np.asarray(each[n][i]), requires_grad=True)
                  for n in ("query", "key", "value")}  # fmt: skip
        kernel = torch.tensor(np.asarray(each["linear"]["kernel"][i]), requires_grad=True)
        query = leaves["query"].reshape(1, 2, 1, 4).expand(3, -1, -1, -1)
        key, value = ((x @ leaves[n]).reshape(3, 4, 2, 4).transpose(1, 2) for n in ("key", "value"))
        pooled = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        expected = pooled.transpose(1, 2).reshape(3, 8) @ kernel
        np.testing.assert_allclose(logits[i], expected.detach().numpy(), rtol=1e-4, atol=1e-4)
        (expected * torch.tensor(weights[i])).sum().backward()
        for name, leaf in (*leaves.items(), ("kernel", kernel)):
            stack = grads["each"]["linear"][name] if name == "kernel" else grads["each"][name]
            np.testing.assert_allclose(stack[i], leaf.grad.numpy(), rtol=1e-3, atol=1e-4)
    for name in ("running_mean", "running_var"):
        params[name] = params[name] - 0.1 * grads[name]
        np.testing.assert_allclose(params[name], getattr(norm, name).numpy(), rtol=1e-5)
    norm.eval()
    x = norm(torch.tensor(blocks[:, :, 1:].mean(axis=0)).transpose(1, 2)).transpose(1, 2)
    one = probes.AttentiveHead(heads=2, num_classes=4)
    expected = one.apply({"params": jax.tree.map(lambda x: x[1], each)}, x.numpy())
    np.testing.assert_allclose(module.apply({"params": params}, blocks)[1], expected, atol=1e-4)
