"""The heads of the probes, against torch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax import heads, load, probe_heads
from tests.classifying import DEEP, untrained
from tests.data import tiny_model


def test_batch_norm_is_torchs():
    """Logits in training and use, and running statistics after two steps."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    norm = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6)
    module = probe_heads.LinearProbe(5, 2)
    params = module.init(jax.random.key(0), np.zeros((1, 5), np.float32))["params"]
    kernel = np.asarray(params["head"]["kernel"])
    for _ in range(2):
        features = (rng.standard_normal((7, 5)) * 3 + 1).astype(np.float32)

        def loss(params, features=features):
            logits, gap = module.apply({"params": params}, features, method="train")
            return gap, (logits, gap)

        grads, (logits, gap) = jax.grad(loss, has_aux=True)(params)
        assert float(gap) == 0 and not np.any(grads["head"]["kernel"])
        expected = norm(torch.tensor(features)).numpy() @ kernel
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        for name in ("running_mean", "running_var"):
            params[name] = params[name] - 0.1 * grads[name]
            np.testing.assert_allclose(params[name], getattr(norm, name).numpy(), rtol=1e-5)
    norm.eval()
    used = module.apply({"params": params}, features)
    np.testing.assert_allclose(used, norm(torch.tensor(features)).numpy() @ kernel, atol=1e-5)
    folded = probe_heads.fold(jax.tree.map(np.asarray, params))
    np.testing.assert_allclose(used, features @ folded["kernel"] + folded["bias"], atol=1e-5)


def test_tokens_of_the_last_blocks(tmp_path):
    """Those of encoders that end there; normed, what `tokens` gives."""
    found = load.load_encoder(untrained(tmp_path / "a.safetensors", "cls", **DEEP))
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    module = heads.classifier(found.model, "cls")

    @jax.jit
    def told(params):
        params = {"params": params}
        found = [module.apply(params, images, 4, normed, method="last") for normed in (False, True)]
        return *found, module.apply(params, images, method="tokens")

    tokens, normed, expected = told(found.params)
    assert tokens.shape == normed.shape == (4, 2, 17, 24)
    np.testing.assert_allclose(normed[-1], expected, atol=1e-5)
    blocks = jax.tree.map(lambda x: x[:3], found.params["encoder"]["blocks"])
    shorter = found.params | {"encoder": found.params["encoder"] | {"blocks": blocks}}
    three = heads.classifier(tiny_model(depth=3), "mean")
    expected = jax.jit(lambda p: three.apply({"params": p}, images, method="tokens"))(shorter)
    np.testing.assert_allclose(tokens[0], expected, atol=1e-5)
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-6)
    expected = expected * found.params["norm"]["scale"] + found.params["norm"]["bias"]
    np.testing.assert_allclose(normed, expected, atol=1e-4)


def test_dinov2s_features():
    """By hand for every head: CLS of one or four blocks, then the mean of the last patches."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 3, 5, 6)).astype(np.float32)
    module = probe_heads.LinearGrid(num_classes=7, count=2)
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


def test_the_attentive_head_is_aims():
    """Batch statistics, attention with keys and values, logits and gradients by torch."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    blocks = (rng.standard_normal((6, 3, 5, 8)) * 2 + 1).astype(np.float32)
    module = probe_heads.AttentiveGrid(width=8, heads=2, num_classes=4, count=2)
    params = module.init(jax.random.key(0), blocks)["params"]
    assert np.abs(params["each"]["key"]).max() <= 8**-0.5 and params["each"]["query"].std() < 0.05
    each = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params["each"])
    params = params | {"each": each}
    weights = rng.standard_normal((2, 3, 4)).astype(np.float32)

    def loss(params):
        logits, gap = module.apply({"params": params}, blocks, method="train")
        return (logits * weights).sum() + gap, logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    norm = torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
    x = norm(torch.tensor(blocks[:, :, 1:].mean(axis=0)).transpose(1, 2)).transpose(1, 2)
    for i in range(2):
        own = {n: torch.tensor(np.asarray(each[n][i]), requires_grad=True)
               for n in ("query", "key", "value")}  # fmt: skip
        kernel = torch.tensor(np.asarray(each["linear"]["kernel"][i]), requires_grad=True)
        query = own["query"].reshape(1, 2, 1, 4).expand(3, -1, -1, -1)
        key, value = ((x @ own[n]).reshape(3, 4, 2, 4).transpose(1, 2) for n in ("key", "value"))
        seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        expected = seen.transpose(1, 2).reshape(3, 8) @ kernel
        np.testing.assert_allclose(logits[i], expected.detach().numpy(), rtol=1e-4, atol=1e-4)
        (expected * torch.tensor(weights[i])).sum().backward()
        for name, found in (*own.items(), ("kernel", kernel)):
            mine = grads["each"]["linear"][name] if name == "kernel" else grads["each"][name]
            np.testing.assert_allclose(mine[i], found.grad.numpy(), rtol=1e-3, atol=1e-4)
    for name in ("running_mean", "running_var"):
        params[name] = params[name] - 0.1 * grads[name]
        np.testing.assert_allclose(params[name], getattr(norm, name).numpy(), rtol=1e-5)
    norm.eval()
    x = norm(torch.tensor(blocks[:, :, 1:].mean(axis=0)).transpose(1, 2)).transpose(1, 2)
    one = probe_heads.AttentiveHead(heads=2, num_classes=4)
    expected = one.apply({"params": jax.tree.map(lambda x: x[1], each)}, x.numpy())
    np.testing.assert_allclose(module.apply({"params": params}, blocks)[1], expected, atol=1e-4)
