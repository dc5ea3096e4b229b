"""Teachers of 2026: tokens equal to those of the reference implementations."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.models import teacher_vit
from dgpt_jax.weights import files, teacher_loading, timm_towers
from tests.support import parity
from tests.support import reference_teachers as teachers

pytest.importorskip("torch")
pytest.importorskip("transformers")

TINY = dict(embed_dim=48, depth=2, img_size=64)
BASE, SMALL, LARGE, PLUS = ({"num_heads": heads} for heads in (12, 6, 16, 20))
GIVEN = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
# Builder, sizes of images (the first is the file's), settings that the files lack.
CASES = {
    "dinov3": (teachers.dinov3, (40, 56), {}),
    "dinov3 gated": (partial(teachers.dinov3, gated=True), (40,), {}),
    "dinov3 by Meta": (teachers.dinov3_original, (40, 24), {"image_size": 40}),
    "dinov3 gated by Meta": (
        partial(teachers.dinov3_original, gated=True), (40,), {"image_size": 40},
    ),
    "dinov3 by timm": (partial(teachers.dinov3_timm, **TINY, **SMALL), (64,), {"image_size": 64}),
    "dinov3 by timm, biases": (
        partial(teachers.dinov3_timm, name="vit_small_patch16_dinov3_qkvb", **TINY, **SMALL), (64,),
        {"image_size": 64},
    ),
    "dinov3 by timm, gated": (
        partial(teachers.dinov3_timm, name="vit_huge_plus_patch16_dinov3",
                **TINY | {"embed_dim": 80}, **PLUS), (64,),
        {"image_size": 64},
    ),
    "PE-core by timm": (partial(teachers.pe_core, **TINY, **SMALL, ref_feat_shape=4), (64,), {}),
    "PE-core without CLS": (
        partial(teachers.pe_core, name="vit_pe_core_gigantic_patch14_448", embed_dim=64, depth=2,
                num_heads=16, img_size=56, ref_feat_shape=4), (56,), {},
    ),
    "PE-core by Meta": (
        partial(teachers.pe_core_original, **TINY, num_heads=3, ref_feat_shape=4), (64,),
        {"heads": 3, **GIVEN},
    ),
    "EVA-02-CLIP": (
        partial(teachers.eva02_clip, **TINY, **BASE), (64,), {}
    ),
    "EVA-02-CLIP by its authors": (
        partial(teachers.eva02_original, **TINY, num_heads=3), (64,), {"heads": 3, **GIVEN}
    ),
    "SigLIP in OpenCLIP": (
        partial(teachers.open_clip_trunk, name="vit_base_patch16_siglip_224",
                **TINY, **BASE), (64,), {},
    ),
    "CLIP by timm in OpenCLIP": (
        partial(teachers.open_clip_trunk, name="vit_base_patch16_clip_quickgelu_224", proj=True,
                **TINY, **BASE), (64,), {},
    ),
    "AIMv2": (teachers.aimv2, (40,), {}),
    "AIMv2 of native resolution": (
        partial(teachers.aimv2, is_native=True), (40, 56), {}
    ),
    "AIMv2 by Apple": (
        partial(teachers.aimv2, original=True), (40,), {"heads": 6}
    ),
    "C-RADIO": (partial(teachers.radio, num_hidden_layers=2), (64, 40), {}),
    "C-RADIO by NVIDIA": (partial(teachers.radio, original=True), (64, 40), {"heads": 6}),
    "TIPSv2": (teachers.tips, (40, 56), {}),
    "SigLIP 2 NaFlex": (teachers.naflex, (40, 56), {}),
}  # fmt: skip


def tokens_of(loaded, images):
    module = teacher_vit.TeacherViT(loaded.tower)
    return np.asarray(jax.jit(lambda x: module.apply({"params": loaded.params}, x))(images))


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_reference(tmp_path, case):
    build, sizes, given = CASES[case]
    reference = build(tmp_path)
    for size in sizes:
        image_size = {} if size == sizes[0] and "image_size" not in given else {"image_size": size}
        loaded = teacher_loading.load(str(tmp_path), **{**given, **image_size})
        images = parity.images(3, size)
        expected = reference(images)
        actual = tokens_of(loaded, images)
        assert loaded.tower.image_size == size and expected.std() > 0.1
        assert actual.shape == expected.shape == (2, loaded.tower.cls + np.prod(loaded.tower.grid),
                                                  loaded.tower.token_width)  # fmt: skip
        np.testing.assert_allclose(actual, expected, atol=2e-4)


def change_json(directory, file: str, **values):
    path = directory / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def replace_array(directory, name: str, array: np.ndarray):
    path = directory / "model.safetensors"
    files.write_safetensors(path, files.read_state(path) | {name: array}, {})


ONE = np.ones(1, np.float32)
TIMM_TINY = partial(teachers.dinov3_timm, **TINY, **SMALL)
SIGLIP = partial(teachers.open_clip_trunk, name="vit_base_patch16_siglip_224", **TINY, **BASE)
# Builder, what is changed, settings, message.
REFUSED = {
    "no size of images": (TIMM_TINY, lambda d: None, {}, "config.teacher.image_size"),
    "size no multiple of the patch": (
        teachers.dinov3, lambda d: None, {"image_size": 52}, "52 is not a multiple .* 8",
    ),
    "no mean": (
        teachers.dinov3, lambda d: (d / "preprocessor_config.json").unlink(), {}, "mean and std",
    ),
    "other base of rotary positions": (
        teachers.dinov3, lambda d: change_json(d, "config.json", rope_theta=50.0), {},
        "rope_theta 50.0",
    ),
    "other periods": (
        teachers.dinov3_original,
        lambda d: replace_array(d, "rope_embed.periods", np.array([1.0, 2.0], np.float32)),
        {"image_size": 40}, "rotary periods of another base",
    ),
    "other mask of biases": (
        teachers.dinov3_original,
        lambda d: replace_array(d, "blocks.0.attn.qkv.bias_mask", np.ones(144, np.float32)),
        {"image_size": 40}, "bias_mask is not 1 .* 0 for keys",
    ),
    "norm of CLS": (
        teachers.dinov3_original, lambda d: replace_array(d, "cls_norm.weight", ONE),
        {"image_size": 40}, "norm of its own for CLS",
    ),
    "ungated activation of gated MLPs": (
        partial(teachers.dinov3, gated=True),
        lambda d: change_json(d, "config.json", hidden_act="gelu"), {}, "gelu.* gated MLPs",
    ),
    "gated activation of ungated MLPs": (
        teachers.dinov3, lambda d: change_json(d, "config.json", hidden_act="silu"), {},
        "swiglu.* ungated MLPs",
    ),
    "surplus array": (
        teachers.aimv2, lambda d: replace_array(d, "surprise", ONE), {}, "unknown surprise",
    ),
    "surplus array of a block": (
        TIMM_TINY, lambda d: replace_array(d, "blocks.1.attn.q_norm.weight", ONE),
        {"image_size": 64}, "unknown blocks.1.attn.q_norm.weight",
    ),
    "other architecture": (
        TIMM_TINY, lambda d: change_json(d, "config.json", architecture="vit_base_patch16_224"),
        {"image_size": 64}, "family vit, .* dinov3",
    ),
    "unknown architecture": (
        partial(teachers.pe_core, **TINY, **SMALL),
        lambda d: change_json(d, "config.json", architecture="vit_pe_spatial_base_patch16_512"),
        {}, "vit_pe_spatial_base_patch16_512.* not a supported teacher",
    ),
    "rotary ViT by timm": (
        SIGLIP,
        lambda d: change_json(d, "open_clip_config.json", model_cfg={
            "vision_cfg": {"timm_model_name": "vit_base_patch16_rope_224"}}),
        {}, "vit_base_patch16_rope_224.* not a supported teacher",
    ),
    "no architecture": (
        SIGLIP, lambda d: (d / "open_clip_config.json").unlink(), {"heads": 12, **GIVEN},
        "no JSON beside it names its architecture",
    ),
    "projection of several layers": (
        SIGLIP,
        lambda d: change_json(d, "open_clip_config.json", model_cfg={"vision_cfg": {
            "timm_model_name": "vit_base_patch16_siglip_224", "timm_proj": "mlp"}}),
        {}, "timm_proj .*mlp.* not linear",
    ),
    "options of timm": (
        SIGLIP,
        lambda d: change_json(d, "open_clip_config.json", model_cfg={"vision_cfg": {
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_model_kwargs": {"qk_norm": True}}}),
        {}, "timm_model_kwargs",
    ),
    "other width of the projection": (
        partial(teachers.eva02_clip, **TINY, **BASE),
        lambda d: change_json(d, "open_clip_config.json", model_cfg={
            "embed_dim": 25, "vision_cfg": {"timm_model_name": "eva02_base_patch16_clip_224"}}),
        {}, "embed_dim .*25.* 24",
    ),
    "other heads than the name's": (
        TIMM_TINY, lambda d: None, {"image_size": 64, "heads": 3}, "heads is 3, .* have 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_other_tokens_is_refused(tmp_path, case):
    build, change, given, message = REFUSED[case]
    build(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        teacher_loading.load(str(tmp_path), **given)


def test_settings_by_name_are_those_of_timm():
    """Heads, activation and eps of every architecture of timm that the table accepts."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    activations = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    checked = 0
    for name in timm.list_models():
        try:
            family, settings = timm_towers.by_name(name, Path())
        except UserError:
            continue
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        block = model.blocks[0]
        assert (settings["heads"], settings["eps"]) == (block.attn.num_heads, block.norm1.eps), name
        if "activation" in settings:
            assert settings["activation"] == activations[type(block.mlp.act).__name__], name
        rotary = getattr(model, "rope", None) is not None
        assert rotary == (family in ("dinov3", "pe_core", "eva02")), name
        checked += 1
    assert checked > 60
