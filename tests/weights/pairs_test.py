"""Every layout into every other: the same to the bit, or one line that says why it cannot be."""

import dataclasses
import json

import numpy as np
import pytest

from dgpt_jax.convert import digpt as official
from dgpt_jax.convert import (
    dinov2_encoder,
    export,
    files,
    formats,
    layout,
    ours,
    parity,
    timm,
)
from dgpt_jax.schema import UserError
from tests.conversions import HEADS, pretrained, random_weights

TARGETS = ("flax", "safetensors", "digpt", "timm", "hf", "big_vision")
# By source and target: "same", or a key of REASONS.
PAIRS = """
run                  same same same       same same gelu
flax, encoder        same same decoders   same same same
safetensors, full    same same same       same same gelu
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
    "decoders": "holds an encoder without decoders",
    "gelu": "--activation=gelu_tanh takes the other one",
    "eps": "timm's ViT has LayerNorms of eps 1e-6",
    "mean": "cannot hold mean pooling",
}
SIZES = ("width", "depth", "heads", "patch", "image_size", "eps", "activation", "mlp_ratio")


def encoder(pooling="cls", classes=0, activation="gelu_tanh", **changes):
    made = random_weights(pooling, classes, activation=activation, **changes)
    made.params["pos_embed"][:, 0] = 0  # big_vision's CLS has none
    return made


def pictures(found):
    """How pictures are prepared: Hugging Face has pixels in the place of crop_pct."""
    edge = int(found.model.image_size / found.preprocess.crop_pct)
    return edge, dataclasses.replace(found.preprocess, crop_pct=1.0)


def write_sources(folder):
    """{source: its path}, all by the tables that are tested elsewhere."""
    exact = encoder(activation="gelu", width=768, heads=12, depth=1, mlp_width=8, patch=8)
    exact.params["encoder/cls_token"] += 1
    written = {
        "flax, encoder": (ours.DIRECTORY, encoder(classes=5)),
        "safetensors, full": (ours.FILE, pretrained()),
        "safetensors, mean": (ours.FILE, encoder("mean", 5)),
        "safetensors, eps": (ours.FILE, encoder(activation="quick_gelu", eps=1e-3)),
        "digpt": (official.LAYOUT, pretrained()),
        "timm, avg": (timm.LAYOUT, encoder("mean", 5)),
        "timm, token": (timm.LAYOUT, encoder()),
        "hf": (formats.LAYOUTS["hf"], encoder()),
        "hf, head": (formats.LAYOUTS["hf"], encoder(classes=5)),
        "big_vision": (formats.LAYOUTS["big_vision"], encoder(classes=5)),
    }
    paths = {}
    for name, (one, made) in written.items():
        paths[name] = folder / name
        paths[name].mkdir()
        if one.suffixes:
            paths[name] /= f"model{one.suffixes[-1]}"
        one.save(made, paths[name])
    full = pretrained()
    config = {"model": dataclasses.asdict(full.model)}
    paths["run"] = folder / "run"
    ours.checkpoint.save_params(paths["run"], 3, layout.unflatten(full.params), {"config": config})
    state = layout.write(timm.entries(1, "cls", head=False), exact.params)
    more = {"mask_token": np.zeros(8), "decoder_embed.weight": np.zeros((8, 768))}
    states = {"mae": state | {n: x.astype(np.float32) for n, x in more.items()}}
    rng = np.random.default_rng(0)
    scales = {
        f"encoder/blocks/{n}": rng.standard_normal((1, 768)).astype(np.float32)
        for n in dinov2_encoder.SCALED
    }
    for name, table in (
        ("dinov2", dinov2_encoder.entries), ("dinov2_pth", dinov2_encoder.own_entries)
    ):  # fmt: skip
        states[name] = layout.write(table(1), exact.params | scales)
    for name, made in states.items():
        (folder / name).mkdir()
        paths[name] = folder / name / "model.safetensors"
        files.write_safetensors(paths[name], made, {})
    told = {"num_attention_heads": 12, "hidden_size": 768}
    (folder / "dinov2/config.json").write_text(json.dumps(told))
    return paths


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_the_table_names_all():
    rows = [line.split("  ")[0] for line in PAIRS.strip().splitlines()]
    names = {row.split(",")[0] for row in rows} - {"run"}
    assert names == set(formats.LAYOUTS) and set(TARGETS) == set(formats.WRITTEN)


@pytest.mark.parametrize("row", PAIRS.strip().splitlines(), ids=lambda row: row.split("  ")[0])
def test_pairs(sources, tmp_path, monkeypatch, row):
    """What they compute is for other tests: here the check of an export does nothing."""
    monkeypatch.setattr(parity, "outputs", lambda weights: None)
    monkeypatch.setattr(parity, "check", lambda *_: "")
    source, cells = row.split("  ")[0], row.split()[-len(TARGETS) :]
    more = HEADS if source == "digpt" else {}
    found, whole = formats.read(sources[source], **more)
    _, alone = formats.read(sources[source], encoder_only=True, **more)  # as the tool reads it
    assert found.name == {"run": "flax"}.get(source, source.split(",")[0])
    for target, cell in zip(TARGETS, cells, strict=True):
        one = formats.LAYOUTS[target]
        dst = tmp_path / f"{target}{one.suffixes[-1] if one.suffixes else ''}"
        before = whole if one.full else alone
        if cell != "same":
            with pytest.raises(UserError, match=REASONS[cell]) as refused:
                export.write(export.prepare(before, one, None, None), one, dst)
            assert "\n" not in str(refused.value) and not dst.exists()
            continue
        made = export.prepare(whole, one, None, None)
        path, _ = export.write(export.prepare(before, one, None, None), one, dst)
        _, again = formats.read(path, **(HEADS if target == "digpt" else {}))
        assert again.full == made.full and again.pooling == made.pooling
        if target not in ("big_vision", "digpt"):  # they do not tell it
            assert pictures(again) == pictures(made)
        for name in SIZES:
            assert getattr(again.model, name) == getattr(made.model, name), name
        assert set(again.params) == set(made.params)
        for name, array in made.params.items():
            np.testing.assert_array_equal(again.params[name], array, err_msg=name)
