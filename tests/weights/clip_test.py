"""CLIP vision towers in their published layouts."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from safetensors.numpy import load_file, save_file

from dgpt_jax.data import normalization
from dgpt_jax.errors import UserError
from dgpt_jax.models import teacher_vit, transformer
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights import teacher_loading as convert
from dgpt_jax.weights.layouts import clip
from tests.support.paths import GOLDEN

OFFICIAL = GOLDEN / "clip_tower_tiny.safetensors"
HF = GOLDEN / "hf_clip_tiny"
# Settings without JSON beside the golden files.
CHANNELS = {"mean": normalization.CLIP_MEAN, "std": normalization.CLIP_STD}
SETTINGS = {"heads": 2, "activation": "gelu", **CHANNELS}


def tokens_of(loaded, images):
    module = teacher_vit.TeacherViT(loaded.tower)
    return jax.jit(lambda x: module.apply({"params": loaded.params}, x))(images)


def inputs(seed, size):
    images = np.random.default_rng(seed).standard_normal((2, 3, size, size))
    return images.astype(np.float32).transpose(0, 2, 3, 1)


def official():
    return convert.load(str(OFFICIAL), **SETTINGS)


def test_official_tower():
    expected = np.load(GOLDEN / "clip_tower_tiny_expected.npz")["tokens"]
    loaded = official()
    assert loaded.tower.image_size == 56 and loaded.tower.grid == (4, 4)
    np.testing.assert_allclose(tokens_of(loaded, inputs(11, 56)), expected, atol=1e-4)
    wrong = convert.load(str(OFFICIAL), **SETTINGS | {"activation": "quick_gelu"})
    assert np.abs(tokens_of(wrong, inputs(11, 56)) - expected).max() > 1e-3


def test_hugging_face_tower():
    expected = np.load(HF / "expected.npz")["tokens"]
    loaded = convert.load(str(HF), **CHANNELS)
    assert (loaded.tower.heads, loaded.tower.activation) == (4, "quick_gelu")
    np.testing.assert_allclose(tokens_of(loaded, inputs(17, 28)), expected, atol=1e-4)


def test_text_towers_are_ignored(tmp_path):
    state = load_file(OFFICIAL)
    text = ("token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale")
    save_file(state | {name: np.ones(3, np.float32) for name in text}, tmp_path / "a.safetensors")
    loaded = convert.load(str(tmp_path / "a.safetensors"), **SETTINGS)
    assert loaded.hash == official().hash


def test_save_writes_what_load_reads(tmp_path):
    loaded = official()
    clip.save(tmp_path, loaded.params, loaded.tower)
    again = convert.load(str(tmp_path))  # heads and activation from its JSON
    assert again.tower == loaded.tower and again.hash == loaded.hash
    images = inputs(0, 56)
    np.testing.assert_array_equal(tokens_of(again, images), tokens_of(loaded, images))


def test_missing_and_contradicting_settings(tmp_path):
    with pytest.raises(UserError, match="config.teacher.heads and config.teacher.activation"):
        convert.load(str(OFFICIAL))
    with pytest.raises(UserError, match="activation: .*config.teacher.activation"):
        convert.load(str(OFFICIAL), heads=2)
    with pytest.raises(UserError, match="config.teacher.heads is 8.* 4"):
        convert.load(str(HF), heads=8)
    with pytest.raises(UserError, match="'relu'.*gelu, gelu_tanh, quick_gelu"):
        convert.load(str(OFFICIAL), heads=2, activation="relu")


@pytest.mark.parametrize("source", [OFFICIAL, HF / "model.safetensors"])
def test_partial_and_extra_weights_are_listed(tmp_path, source):
    if (source.parent / "config.json").exists():
        shutil.copy(source.parent / "config.json", tmp_path)
        settings, block = CHANNELS, "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    else:
        settings = SETTINGS
        block = "visual.transformer.resblocks.1.attn.in_proj_weight"
    state = load_file(source)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in state.items() if k != block}, path)
    with pytest.raises(UserError, match="missing .*1"):
        convert.load(str(path), **settings)
    prefix = block.split(".")[0]
    save_file(state | {f"{prefix}.surprise": np.ones(1, np.float32)}, path)
    with pytest.raises(UserError, match="unknown .*surprise"):
        convert.load(str(path), **settings)


def test_positions_are_interpolated_like_torch():
    torch = pytest.importorskip("torch")
    loaded = convert.load(str(OFFICIAL), **SETTINGS, image_size=84)
    assert loaded.tower.grid == (6, 6) and "56 to 84" in loaded.notes[0]
    table = load_file(OFFICIAL)["visual.positional_embedding"]
    grid = torch.tensor(table[1:]).reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).reshape(36, 64).numpy()
    np.testing.assert_allclose(loaded.params["positions"][1:], expected, atol=1e-5)
    np.testing.assert_array_equal(loaded.params["positions"][0], table[0])
    assert tokens_of(loaded, inputs(0, 84)).shape == (2, 37, 64)


def test_teacher_tokens_from_raw_images():
    loaded = official()
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    normalized = (raw / 255 - normalization.CLIP_MEAN) / normalization.CLIP_STD
    tokens = teacher_vit.teacher_tokens(loaded.tower, loaded.params, jnp.asarray(raw))
    expected = tokens_of(loaded, normalized.astype(np.float32))
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
    large = np.repeat(np.repeat(raw, 2, axis=1), 2, axis=2)
    resized = teacher_vit.teacher_tokens(loaded.tower, loaded.params, jnp.asarray(large))
    assert resized.shape == tokens.shape
    half = teacher_vit.teacher_tokens(loaded.tower, loaded.params, jnp.asarray(raw), "bfloat16")
    assert half.dtype == jnp.float32
    assert 0.99 < cosine(half, tokens).min() < 0.9999999


def cosine(a, b):
    return np.asarray((a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)))


def test_every_activation_is_known_to_the_blocks():
    assert set(transformer.ACTIVATIONS) == {"gelu", "gelu_tanh", "quick_gelu", "swiglu"}


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_gelu_is_exact_up_to_rounding(dtype, relative):
    x = jnp.linspace(-6, 6, 2001).astype(dtype)
    exact = np.asarray(x, np.float64) * scipy.special.ndtr(np.asarray(x, np.float64))
    values = np.asarray(transformer.ACTIVATIONS["gelu"](x), np.float64)
    assert (np.abs(values - exact) <= relative * np.abs(exact) + 1e-6).all()


def test_open_clip_json(tmp_path):
    shutil.copy(OFFICIAL, tmp_path / "open_clip_model.safetensors")
    model = {"embed_dim": 64, "vision_cfg": {"width": 64, "head_width": 16}, "quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}})
    )
    tower = convert.load(str(tmp_path)).tower
    assert (tower.heads, tower.activation, tower.mean) == (4, "quick_gelu", (0, 0, 0))


def test_unsupported_weights(tmp_path):
    with pytest.raises(UserError, match="no such weights file"):
        convert.load(str(tmp_path / "absent.safetensors"))
    with pytest.raises(UserError, match=str(tmp_path)):
        convert.load(str(tmp_path))
    with pytest.raises(UserError, match="timm_vit_tiny_avg.*Dinov2Model"):
        convert.load(str(GOLDEN / "timm_vit_tiny_avg.safetensors"))
    resnet = {"visual.layer1.0.conv1.weight": np.ones(1, np.float32)}
    files.write_safetensors(tmp_path / "r.safetensors", resnet, {})
    with pytest.raises(UserError, match="ResNet.*SiglipModel"):
        convert.load(str(tmp_path / "r.safetensors"))
    assert mapping.flatten({"a": {"b": 1}}) == {"a/b": 1}
