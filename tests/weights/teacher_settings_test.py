"""A teacher's settings from its config, its own code's values, and files beside other files."""

import dataclasses
import json

import numpy as np
import pytest

from dgpt_jax import config, towers
from dgpt_jax.convert import clip, files, teacher
from dgpt_jax.schema import UserError, parse
from tests.data import SIGLIP, TOWER, random_teacher
from tests.published import HALF, HF, IMAGE, LISTS, MODEL, OPEN, OTHER, PRE, changed, write_all


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{layout: directory of weights with a JSON that tells all but mean and std}."""
    root = tmp_path_factory.mktemp("published")
    write_all(root)
    return root


GIVEN = [
    ("open_clip", {}, OTHER, OTHER),
    ("open_clip", {PRE: {"image_mean": LISTS["mean"]}}, {"std": HALF}, {"std": HALF}),
    ("siglip", {}, OTHER, OTHER),
    ("clip", {PRE: IMAGE}, OTHER, OTHER),
    ("clip", {PRE: IMAGE}, {"mean": HALF}, "config.teacher.mean is (0.5, 0.5, 0.5), the weights"),
    ("siglip", {}, {"mean": (0.25,), "std": [0.5]}, {"mean": (0.25,) * 3, "std": HALF}),
    ("clip", {PRE: IMAGE, HF: {"image_size": 32}}, {"image_size": 32}, {"image_size": 32}),
    ("clip", {PRE: IMAGE, HF: {"image_size": 32}}, {"image_size": 16}, {"image_size": 16}),
]


@pytest.mark.parametrize(("kind", "changes", "given", "expected"), GIVEN)
def test_given_by_the_config(published, tmp_path, kind, changes, given, expected):
    path = changed(published, tmp_path, kind, changes)
    settings = parse(config.Teacher, {"weights": str(path)} | given)
    if isinstance(expected, str):
        with pytest.raises(UserError) as refused:
            teacher.load_configured(settings)
        assert expected in str(refused.value)
        return
    tower = teacher.load_configured(settings).tower
    assert {name: getattr(tower, name) for name in expected} == expected


BAD = [(), (0.5, 0.5), (0.5,) * 4, (123.7, 116.3, 103.5), (0.5, 0.5, -0.1), (0.5, float("nan"), 1)]


@pytest.mark.parametrize("value", [*BAD, 0.5, "half", (True, 0, 0)])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_config_that_tells_no_mean_or_std(name, value):
    with pytest.raises(UserError, match=rf"config\.(teacher\.)?{name}.* (takes|must|is) "):
        parse(config.Teacher, {"weights": "x", name: value})


@pytest.mark.parametrize("changes", [{"activation": "gelu_tanh"}, {"eps": 1e-6}, {"eps": 1e-3}])
def test_what_is_saved_is_read_back(tmp_path, changes):
    tower = dataclasses.replace(TOWER, **OTHER, **changes)
    assert teacher.load(str(random_teacher(tmp_path, tower=tower))).tower == tower


def test_the_layouts_own_values_are_said(published, tmp_path):
    notes = teacher.load(str(changed(published, tmp_path, "siglip", {}))).notes
    assert [note.split(" tells ")[1] for note in notes] == [
        f"{name}: that of its layout is taken, (0.5, 0.5, 0.5)" for name in ("mean", "std")
    ]
    assert teacher.load(str(tmp_path), **OTHER).notes == ()
    assert teacher.load(str(tmp_path)).tower == SIGLIP


def test_openais_own_file_is_described_by_its_code(published, tmp_path):
    """`torch.jit.load("ViT-B-32.pt").state_dict()`: heads of 64 channels, QuickGELU, one mean."""
    tower = towers.Tower(
        image_size=16, patch=4, width=128, depth=1, heads=2, mlp_width=64, out_width=24,
        activation="quick_gelu",
    )  # fmt: skip
    random_teacher(tmp_path / "a", tower=tower)
    state = files.read_state(tmp_path / "a/open_clip_model.safetensors")
    for name in clip.OPENAI:
        state[name] = np.ones((), np.float32)
    path = tmp_path / "ViT.safetensors"
    files.write_safetensors(path, state, {})
    assert teacher.load(str(path)).tower == tower
    with pytest.raises(UserError, match="config.teacher.mean is"):
        teacher.load(str(path), mean=HALF)
    beside = tmp_path / "ViT-B-16.json"
    for more, message in [
        ({}, "activation quick_gelu, the JSON beside it says gelu"),
        ({"quick_gelu": True, "vision_cfg": {"head_width": 32}}, "heads 2, the JSON .* says 4"),
    ]:
        beside.write_text(json.dumps({"vision_cfg": {"width": 128}} | more))
        with pytest.raises(UserError, match=message):
            teacher.load(str(path))
    beside.unlink()
    files.write_safetensors(path, {n: x for n, x in state.items() if n != clip.OPENAI[0]}, {})
    with pytest.raises(UserError, match="does not tell heads and activation"):
        teacher.load(str(path))


def test_a_models_json_under_its_own_name(published, tmp_path):
    """open_clip/model_configs/ViT-B-16.json beside the weights; of two none is chosen."""
    path = changed(published, tmp_path, "open_clip", {PRE: IMAGE})
    (path / OPEN).unlink()
    (path / "ViT-B-16.json").write_text(json.dumps(MODEL))
    assert teacher.load(str(path)).tower.heads == 2
    (path / "ViT-L-14.json").write_text(json.dumps(MODEL))
    with pytest.raises(UserError, match="ViT-B-16.json and .*ViT-L-14.json each describe"):
        teacher.load(str(path))


def test_timms_weights_beside_open_clips(published, tmp_path):
    """As timm's repositories hold them; config.json is timm's, and tells mean and std too."""
    path = changed(published, tmp_path, "open_clip", {})
    random = {"patch_embed.proj.weight": np.zeros((32, 3, 4, 4), np.float32)}
    files.write_safetensors(path / "model.safetensors", random, {})
    timm = {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": LISTS}
    (path / HF).write_text(json.dumps(timm))
    found = teacher.load(str(path)).tower
    assert {name: getattr(found, name) for name in OTHER} == OTHER and found.heads == 2
    (path / OPEN).unlink()
    with pytest.raises(UserError, match="does not tell heads and activation"):  # timm's is no CLIP
        teacher.load(str(path / "open_clip_model.safetensors"))
