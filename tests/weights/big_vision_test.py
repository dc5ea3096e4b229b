"""big_vision's .npz: round trips, attention of Flax, older files."""

import flax.linen as nn
import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.models import transformer
from dgpt_jax.weights import export, files, parity, registry
from tests.support.conversions import random_weights, same


def test_big_vision_round_trip(tmp_path):
    weights = random_weights("cls", 5, activation="gelu_tanh")
    path, verified = export.write(weights, registry.LAYOUTS["big_vision"], tmp_path / "a.npz")
    assert verified == "not verified: big_vision is not installed"
    with np.load(path) as state:
        assert state["params/pos_embedding"].shape == (1, 16, 24)
        kernel = state[
            "params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/kernel"
        ]
        assert kernel.shape == (24, 3, 8)
    _, first = registry.read(path)
    expected, actual = parity.outputs(weights), parity.outputs(first)
    np.testing.assert_allclose(actual.features, expected.features, atol=1e-5)
    path, _ = export.write(first, registry.LAYOUTS["big_vision"], tmp_path / "b.npz")
    same(first, registry.read(path)[1])


def test_big_vision_in_flax(tmp_path):
    """Attention of Flax: query, key and value (D, heads, head), out (heads, head, D)."""
    weights = random_weights("cls", 0, activation="gelu_tanh", depth=1)
    path, _ = export.write(weights, registry.LAYOUTS["big_vision"], tmp_path / "a.npz")
    prefix = "params/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/"
    params: dict = {}
    for name, array in files.read_state(path).items():
        if name.startswith(prefix):
            part, leaf = name.removeprefix(prefix).split("/")
            params.setdefault(part, {})[leaf] = array
    x = np.random.default_rng(1).standard_normal((2, 5, 24)).astype(np.float32)
    expected = nn.MultiHeadDotProductAttention(num_heads=3).apply({"params": params}, x, x)
    params = {p.rsplit("/attn/")[1]: v[0] for p, v in weights.params.items() if "/attn/" in p}
    attn = {
        "qkv": {leaf: params[f"qkv/{leaf}"] for leaf in ("kernel", "bias")},
        "proj": {leaf: params[f"proj/{leaf}"] for leaf in ("kernel", "bias")},
    }
    np.testing.assert_allclose(
        transformer.Attention(3, np.float32).apply({"params": attn}, x), expected, atol=1e-5
    )


def older(state):
    """Names from before 2022, and a position of CLS that is not in its token."""
    new = {
        "pos_embedding": "Transformer/posembed_input/pos_embedding",
        "LayerNorm_1/": "LayerNorm_2/", "MlpBlock_0/": "MlpBlock_3/",
        "MultiHeadDotProductAttention_0/": "MultiHeadDotProductAttention_1/",
    }  # fmt: skip
    params = {}
    for name, array in state.items():
        for one, other in new.items():
            name = name.replace(one, other)
        params[name] = array
    cls, positions = params["cls"], params["Transformer/posembed_input/pos_embedding"]
    joined = np.concatenate([cls - 1, positions], axis=1)
    return params | {"cls": np.ones_like(cls), "Transformer/posembed_input/pos_embedding": joined}


def scanned(state):
    """Stacked blocks, and training state."""
    params = {f"params/{n}": x for n, x in state.items() if "encoderblock_" not in n}
    for name in [n for n in state if "encoderblock_0" in n]:
        layers = [state[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(2)]
        params[f"params/{name.replace('_0', '', 1)}"] = np.stack(layers)
    return params | {"opt/0/mu/cls": np.zeros(3, np.float32), "extra/step": np.zeros(())}


@pytest.mark.parametrize("change", [older, scanned])
def test_older_and_scanned_files(tmp_path, change):
    weights = random_weights("cls", 5, activation="gelu_tanh")
    weights.params["pos_embed"][:, 0] = 0
    path, _ = export.write(weights, registry.LAYOUTS["big_vision"], tmp_path / "a.npz")
    state = {n.removeprefix("params/"): x for n, x in files.read_state(path).items()}
    np.savez(tmp_path / "b.npz", **change(state))
    layout, again = registry.read(tmp_path / "b.npz")
    assert layout.name == "big_vision" and again.num_classes == 5
    if change is older:  # the network uses only the sum of CLS and its position
        again.params["encoder/cls_token"] += again.params["pos_embed"][:, :1]
        again.params["pos_embed"][:, 0] = 0
        np.testing.assert_allclose(
            again.params["encoder/cls_token"], weights.params["encoder/cls_token"], atol=1e-6
        )
        again.params["encoder/cls_token"][:] = weights.params["encoder/cls_token"]
    for name, array in weights.params.items():
        np.testing.assert_array_equal(again.params[name], array, err_msg=name)


def test_unsupported_files(tmp_path):
    weights = random_weights("cls", 0, activation="gelu_tanh")
    path, _ = export.write(weights, registry.LAYOUTS["big_vision"], tmp_path / "a.npz")
    state = files.read_state(path)
    gap = {name: x for name, x in state.items() if name != "params/cls"}
    some = np.zeros(3, np.float32)
    for other, message in [
        (gap, "pool_type gap"),
        (gap | {"params/MAPHead_0/probe": some}, "pool_type map"),
        (state | {"params/pre_logits/bias": some}, "unknown pre_logits/bias"),
        (state | {"surplus": some}, "unknown surplus"),
    ]:
        np.savez(tmp_path / "b.npz", **other)
        with pytest.raises(UserError, match=message):
            registry.read(tmp_path / "b.npz")
