"""A teacher's settings by the config, by its own code and by JSON of several libraries."""

import dataclasses
import json

import numpy as np
import pytest

from dgpt_jax.config import roots
from dgpt_jax.config.schema import parse
from dgpt_jax.errors import UserError
from dgpt_jax.models import teacher_vit
from dgpt_jax.weights import files, teacher_loading
from dgpt_jax.weights.layouts import clip
from tests.support.data import SIGLIP, TOWER, random_teacher
from tests.support.published import (
    HALF,
    HF,
    IMAGE,
    LISTS,
    MODEL,
    OPEN,
    OTHER,
    PRE,
    changed,
    write_all,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Directory of weights per layout, with JSON for all settings but mean and std."""
    root = tmp_path_factory.mktemp("published")
    write_all(root)
    return root


OVERRIDES = [
    ("open_clip", {}, OTHER, OTHER),
    ("open_clip", {PRE: {"image_mean": LISTS["mean"]}}, {"std": HALF}, {"std": HALF}),
    ("siglip", {}, OTHER, OTHER),
    ("clip", {PRE: IMAGE}, OTHER, OTHER),
    ("clip", {PRE: IMAGE}, {"mean": HALF}, "config.teacher.mean is (0.5, 0.5, 0.5)"),
    ("siglip", {}, {"mean": (0.25,), "std": [0.5]}, {"mean": (0.25,) * 3, "std": HALF}),
    ("clip", {PRE: IMAGE, HF: {"image_size": 32}}, {"image_size": 32}, {"image_size": 32}),
    ("clip", {PRE: IMAGE, HF: {"image_size": 32}}, {"image_size": 16}, {"image_size": 16}),
]


@pytest.mark.parametrize(("kind", "changes", "overrides", "expected"), OVERRIDES)
def test_overrides_by_the_config(published, tmp_path, kind, changes, overrides, expected):
    path = changed(published, tmp_path, kind, changes)
    settings = parse(roots.TeacherConfig, {"weights": str(path)} | overrides)
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            teacher_loading.load_configured(settings)
        assert expected in str(error.value)
        return
    tower = teacher_loading.load_configured(settings).tower
    assert {name: getattr(tower, name) for name in expected} == expected


INVALID = [
    (),
    (0.5, 0.5),
    (0.5,) * 4,
    (123.7, 116.3, 103.5),
    (0.5, 0.5, -0.1),
    (0.5, float("nan"), 1),
]


@pytest.mark.parametrize("value", [*INVALID, 0.5, "half", (True, 0, 0)])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_invalid_mean_or_std_in_the_config(name, value):
    with pytest.raises(UserError, match=rf"config\.(teacher\.)?{name}"):
        parse(roots.TeacherConfig, {"weights": "x", name: value})


@pytest.mark.parametrize("changes", [{"activation": "gelu_tanh"}, {"eps": 1e-6}, {"eps": 1e-3}])
def test_save_round_trip(tmp_path, changes):
    tower = dataclasses.replace(TOWER, **OTHER, **changes)
    assert teacher_loading.load(str(random_teacher(tmp_path, tower=tower))).tower == tower


def test_defaults_of_the_layout_are_noted(published, tmp_path):
    notes = teacher_loading.load(str(changed(published, tmp_path, "siglip", {}))).notes
    assert len(notes) == 2
    for note, name in zip(notes, ("mean", "std"), strict=True):
        assert f" {name}: " in note and "(0.5, 0.5, 0.5)" in note
    assert teacher_loading.load(str(tmp_path), **OTHER).notes == ()
    assert teacher_loading.load(str(tmp_path)).tower == SIGLIP


def test_openais_own_file_has_the_settings_of_its_code(published, tmp_path):
    """`torch.jit.load("ViT-B-32.pt").state_dict()`: heads of 64 channels, QuickGELU, one mean."""
    tower = teacher_vit.TeacherArchitecture(
        image_size=16, patch=4, width=128, depth=1, heads=2, mlp_width=64, out_width=24,
        activation="quick_gelu",
    )  # fmt: skip
    random_teacher(tmp_path / "a", tower=tower)
    state = files.read_state(tmp_path / "a/open_clip_model.safetensors")
    for name in clip.OPENAI:
        state[name] = np.ones((), np.float32)
    path = tmp_path / "ViT.safetensors"
    files.write_safetensors(path, state, {})
    assert teacher_loading.load(str(path)).tower == tower
    with pytest.raises(UserError, match="config.teacher.mean is"):
        teacher_loading.load(str(path), mean=HALF)
    json_file = tmp_path / "ViT-B-16.json"
    for content, message in [
        ({}, "activation quick_gelu.* gelu"),
        ({"quick_gelu": True, "vision_cfg": {"head_width": 32}}, "heads 2, .* 4"),
    ]:
        json_file.write_text(json.dumps({"vision_cfg": {"width": 128}} | content))
        with pytest.raises(UserError, match=message):
            teacher_loading.load(str(path))
    json_file.unlink()
    files.write_safetensors(path, {n: x for n, x in state.items() if n != clip.OPENAI[0]}, {})
    with pytest.raises(UserError, match="config.teacher.heads and config.teacher.activation"):
        teacher_loading.load(str(path))


def test_json_of_open_clips_model_configs(published, tmp_path):
    """open_clip/model_configs/ViT-B-16.json beside the weights; two are ambiguous."""
    path = changed(published, tmp_path, "open_clip", {PRE: IMAGE})
    (path / OPEN).unlink()
    (path / "ViT-B-16.json").write_text(json.dumps(MODEL))
    assert teacher_loading.load(str(path)).tower.heads == 2
    (path / "ViT-L-14.json").write_text(json.dumps(MODEL))
    with pytest.raises(UserError, match="ViT-B-16.json and .*ViT-L-14.json"):
        teacher_loading.load(str(path))


def test_weights_of_timm_and_open_clip_in_one_directory(published, tmp_path):
    """As in timm's repositories; config.json is timm's, with mean and std."""
    path = changed(published, tmp_path, "open_clip", {})
    random = {"patch_embed.proj.weight": np.zeros((32, 3, 4, 4), np.float32)}
    files.write_safetensors(path / "model.safetensors", random, {})
    timm = {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": LISTS}
    (path / HF).write_text(json.dumps(timm))
    tower = teacher_loading.load(str(path)).tower
    assert {name: getattr(tower, name) for name in OTHER} == OTHER and tower.heads == 2
    (path / OPEN).unlink()
    with pytest.raises(
        UserError, match="config.teacher.heads and config.teacher.activation"
    ):  # timm's is no CLIP
        teacher_loading.load(str(path / "open_clip_model.safetensors"))
