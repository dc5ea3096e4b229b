"""Every layout into every other: bitwise equal, or an error with the reason."""

import dataclasses
import json

import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.weights import export, files, mapping, parity, registry
from dgpt_jax.weights.layouts import digpt as official
from dgpt_jax.weights.layouts import dinov2_encoder, native, timm
from tests.support.conversions import HEADS, pretrained, random_weights

TARGETS = ("flax", "safetensors", "digpt", "timm", "hf", "big_vision")
# By source and target: "same", or a key of REASONS.
PAIRS = """
run                  same same same       same same gelu
flax, encoder        same same decoders   same same same
safetensors, full    same same same       same same gelu
safetensors, learned  same same same       same same gelu
safetensors, mean    same same decoders   same mean mean
safetensors, eps     same same decoders   eps  same gelu
digpt                same same same       same same gelu
timm, avg            same same decoders   same mean mean
timm, token          same same decoders   same same same
hf                   same same decoders   same same same
hf, head             same same decoders   same same same
big_vision           same same decoders   same same same
mae                  same same decoders   same same gelu
dinov2               same same decoders   same same gelu
dinov2_pth           same same decoders   same same gelu
"""
REASONS = {
    "decoders": "without decoders",
    "gelu": "--activation=gelu_tanh",
    "eps": "--eps=1e-6",
    "mean": "mean pooling",
}
SIZES = ("width", "depth", "heads", "patch", "image_size", "eps", "activation", "mlp_ratio")


def encoder(pooling="cls", classes=0, activation="gelu_tanh", **changes):
    weights = random_weights(pooling, classes, activation=activation, **changes)
    weights.params["pos_embed"][:, 0] = 0  # big_vision's CLS has no position
    return weights


def preprocessing(weights):
    """Preprocessing with pixels instead of crop_pct, as Hugging Face has it."""
    edge = int(weights.model.image_size / weights.preprocess.crop_pct)
    return edge, dataclasses.replace(weights.preprocess, crop_pct=1.0)


def write_sources(folder):
    """{source: its path}; the tables are tested elsewhere."""
    exact = encoder(activation="gelu", width=768, heads=12, depth=1, mlp_width=8, patch=8)
    exact.params["encoder/cls_token"] += 1
    written = {
        "flax, encoder": (native.DIRECTORY, encoder(classes=5)),
        "safetensors, full": (native.FILE, pretrained()),
        "safetensors, learned": (native.FILE, pretrained(positions="learned")),
        "safetensors, mean": (native.FILE, encoder("mean", 5)),
        "safetensors, eps": (native.FILE, encoder(activation="quick_gelu", eps=1e-3)),
        "digpt": (official.LAYOUT, pretrained()),
        "timm, avg": (timm.LAYOUT, encoder("mean", 5)),
        "timm, token": (timm.LAYOUT, encoder()),
        "hf": (registry.LAYOUTS["hf"], encoder()),
        "hf, head": (registry.LAYOUTS["hf"], encoder(classes=5)),
        "big_vision": (registry.LAYOUTS["big_vision"], encoder(classes=5)),
    }
    paths = {}
    for name, (layout, weights) in written.items():
        paths[name] = folder / name
        paths[name].mkdir()
        if layout.suffixes:
            paths[name] /= f"model{layout.suffixes[-1]}"
        layout.save(weights, paths[name])
    full = pretrained()
    config = {"model": dataclasses.asdict(full.model)}
    paths["run"] = folder / "run"
    native.orbax_checkpoint.save_params(
        paths["run"], 3, mapping.unflatten(full.params), {"config": config}
    )
    state = mapping.write(timm.entries(1, "cls", head=False), exact.params)
    decoder = {"mask_token": np.zeros(8), "decoder_embed.weight": np.zeros((8, 768))}
    states = {"mae": state | {n: x.astype(np.float32) for n, x in decoder.items()}}
    rng = np.random.default_rng(0)
    scales = {
        f"encoder/blocks/{n}": rng.standard_normal((1, 768)).astype(np.float32)
        for n in dinov2_encoder.SCALED
    }
    for name, table in (
        ("dinov2", dinov2_encoder.entries), ("dinov2_pth", dinov2_encoder.own_entries)
    ):  # fmt: skip
        states[name] = mapping.write(table(1), exact.params | scales)
    for name, state in states.items():
        (folder / name).mkdir()
        paths[name] = folder / name / "model.safetensors"
        files.write_safetensors(paths[name], state, {})
    config = {"num_attention_heads": 12, "hidden_size": 768}
    (folder / "dinov2/config.json").write_text(json.dumps(config))
    return paths


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_the_table_is_complete():
    rows = [line.split("  ")[0] for line in PAIRS.strip().splitlines()]
    names = {row.split(",")[0] for row in rows} - {"run"}
    assert names == set(registry.LAYOUTS) and set(TARGETS) == set(registry.WRITTEN)


@pytest.mark.parametrize("row", PAIRS.strip().splitlines(), ids=lambda row: row.split("  ")[0])
def test_pairs(sources, tmp_path, monkeypatch, row):
    """Without the check of outputs, which other tests cover."""
    monkeypatch.setattr(parity, "outputs", lambda weights: None)
    monkeypatch.setattr(parity, "check", lambda *_: "")
    source, cells = row.split("  ")[0], row.split()[-len(TARGETS) :]
    heads = HEADS if source == "digpt" else {}
    detected, complete = registry.read(sources[source], **heads)
    _, encoder_only = registry.read(sources[source], encoder_only=True, **heads)  # as in the tool
    assert detected.name == {"run": "flax"}.get(source, source.split(",")[0])
    for target, cell in zip(TARGETS, cells, strict=True):
        layout = registry.LAYOUTS[target]
        dst = tmp_path / f"{target}{layout.suffixes[-1] if layout.suffixes else ''}"
        weights = complete if layout.full else encoder_only
        if cell != "same":
            with pytest.raises(UserError, match=REASONS[cell]) as error:
                export.write(export.prepare(weights, layout, None, None), layout, dst)
            assert "\n" not in str(error.value) and not dst.exists()
            continue
        expected = export.prepare(complete, layout, None, None)
        path, _ = export.write(export.prepare(weights, layout, None, None), layout, dst)
        _, again = registry.read(path, **(HEADS if target == "digpt" else {}))
        assert again.full == expected.full and again.pooling == expected.pooling
        assert not again.full or again.model.positions == expected.model.positions
        if target not in ("big_vision", "digpt"):  # they do not store it
            assert preprocessing(again) == preprocessing(expected)
        for name in SIZES:
            assert getattr(again.model, name) == getattr(expected.model, name), name
        assert set(again.params) == set(expected.params)
        for name, array in expected.params.items():
            np.testing.assert_array_equal(again.params[name], array, err_msg=name)
