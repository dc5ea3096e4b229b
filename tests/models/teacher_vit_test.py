"""Teachers compared with transformers' models, and training with one without a CLS token."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax import train
from dgpt_jax.config import TrainConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import loader, normalization
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import UserError
from dgpt_jax.models import flops, teacher_vit, vit
from dgpt_jax.training.tasks.pretrain import open_pretrain
from dgpt_jax.weights import files, mapping, teacher_loading
from dgpt_jax.weights.layouts import siglip
from tests.support import parity
from tests.support.data import SIGLIP, TINY, image_dataset, random_siglip, token_store

# 448 · (488 / 448) is a little less than 488 in floating point.
SIGLIP_VISION = dict(
    hidden_size=448, intermediate_size=488, num_hidden_layers=2, num_attention_heads=8,
    image_size=36, patch_size=8,
)  # fmt: skip
CLIP = {"mean": normalization.CLIP_MEAN, "std": normalization.CLIP_STD}
IMAGENET = {"mean": normalization.IMAGENET_MEAN, "std": normalization.IMAGENET_STD}
DINOV2 = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=6, image_size=40, patch_size=8,
    mlp_ratio=2,
)  # fmt: skip


def tokens_of(loaded, images):
    module = teacher_vit.TeacherViT(loaded.tower)
    return jax.jit(lambda x: module.apply({"params": loaded.params}, x))(images)


def assert_tokens(loaded, images, expected, atol=1e-4):
    assert expected.std() > 0.1
    np.testing.assert_allclose(tokens_of(loaded, images), expected, atol=atol)


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def assert_clip(model, directory):
    """Compares a saved CLIP of transformers with the teacher that is loaded from its directory."""
    torch = pytest.importorskip("torch")
    images = parity.images(5, 32)
    hidden = torch.tensor(parity.hidden_state(model.vision_model, images))
    with torch.no_grad():
        normed = model.vision_model.post_layernorm(hidden)
        expected = model.visual_projection(normed).numpy()
    assert_tokens(teacher_loading.load(str(directory), **CLIP), images, expected)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip(transformers, tmp_path, activation):
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, projection_dim=20, num_hidden_layers=3,
        num_attention_heads=6, image_size=32, patch_size=8, hidden_act=activation,
    )  # fmt: skip
    model = parity.randomize(transformers.CLIPVisionModelWithProjection(config))
    model.save_pretrained(tmp_path)
    assert_clip(model, tmp_path)


@pytest.mark.parametrize("kind", ["MetaClip2", "ChineseCLIP"])
def test_models_with_a_clip_vision_tower(transformers, tmp_path, kind):
    """Full models whose vision tower and config defaults are CLIP's."""
    vision = dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=12,
        image_size=32, patch_size=8,
    )  # fmt: skip
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, projection_dim=20
    )
    model = parity.randomize(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    assert_clip(model, tmp_path)


@pytest.mark.parametrize("with_text", [False, True])
def test_siglip(transformers, tmp_path, with_text):
    """36 pixels are four patches of 8 and a remainder, as 384 are 27 of 14."""
    if with_text:
        text = dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=20, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        config = transformers.SiglipConfig(text_config=text, vision_config=SIGLIP_VISION)
        model = parity.randomize(transformers.SiglipModel(config))
        vision = model.vision_model
    else:
        vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP_VISION))
        model = parity.randomize(vision)
    model.save_pretrained(tmp_path)
    loaded = teacher_loading.load(str(tmp_path))
    tower = loaded.tower
    assert (tower.image_size, tower.grid, tower.mlp_width) == (36, (4, 4), 488)
    assert not tower.cls and tower.token_width == 448
    assert tower.mean == tower.std == (0.5, 0.5, 0.5)
    images = parity.images(5, 36)
    expected = parity.hidden_state(vision, images)
    assert expected.shape == (2, 16, 448)
    assert_tokens(loaded, images, expected)
    larger, images = teacher_loading.load(str(tmp_path), image_size=48), parity.images(6, 48)
    assert_tokens(
        larger, images, parity.hidden_state(vision, images, interpolate_pos_encoding=True)
    )


def dinov2(transformers, registers: bool, classifier: bool, **changes):
    """(model, its Dinov2Model or Dinov2WithRegistersModel)."""
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = DINOV2 | ({"num_register_tokens": 3} if registers else {}) | changes
    config = getattr(transformers, f"{kind}Config")(**settings)
    name = f"{kind}ForImageClassification" if classifier else f"{kind}Model"
    model = parity.randomize(getattr(transformers, name)(config))
    return model, getattr(model, model.base_model_prefix) if classifier else model


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2(transformers, tmp_path, registers, classifier, swiglu):
    model, vision = dinov2(transformers, registers, classifier, use_swiglu_ffn=swiglu)
    model.save_pretrained(tmp_path)
    loaded = teacher_loading.load(str(tmp_path), **IMAGENET)
    tower = loaded.tower
    assert (tower.cls, tower.registers, tower.grid) == (True, 3 * registers, (5, 5))
    assert tower.activation == ("swiglu" if swiglu else "gelu")
    images = parity.images(3, 40)
    expected = parity.hidden_state(vision, images)
    expected = np.delete(expected, range(1, 1 + tower.registers), axis=1)
    assert expected.shape == (2, 26, 48)
    assert_tokens(loaded, images, expected)
    if swiglu:
        with pytest.raises(UserError, match="activation.*'gelu'.*'swiglu'"):
            teacher_loading.load(str(tmp_path), activation="gelu")


@pytest.mark.parametrize("size", [24, 56])
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_at_another_size(transformers, tmp_path, registers, size):
    """Position interpolation is antialiased only with registers."""
    model, _ = dinov2(transformers, registers, classifier=False)
    model.save_pretrained(tmp_path)
    loaded = teacher_loading.load(str(tmp_path), **IMAGENET, image_size=size)
    assert re.search(rf"40\b.*\b{size}\b", loaded.notes[-1])
    images = parity.images(4, size)
    expected = parity.hidden_state(model, images)
    expected = np.delete(expected, range(1, 1 + loaded.tower.registers), axis=1)
    assert_tokens(loaded, images, expected)


def test_preprocessing_beside_the_weights(tmp_path):
    random_siglip(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}))
    tower = teacher_loading.load(str(tmp_path)).tower
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    path.write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json"):
        teacher_loading.load(str(tmp_path))


def test_heads_are_not_guessed(tmp_path):
    random_siglip(tmp_path)
    tower = teacher_loading.load(str(tmp_path)).tower
    assert tower == SIGLIP
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="heads.*JSON.*teacher.heads"):
        teacher_loading.load(str(tmp_path))
    assert teacher_loading.load(str(tmp_path), heads=2).tower == tower
    assert (
        teacher_loading.load(str(tmp_path), heads=2, activation="gelu").tower.activation == "gelu"
    )
    with pytest.raises(UserError, match="5 heads.*32"):
        teacher_loading.load(str(tmp_path), heads=5)


def test_missing_unknown_and_foreign_arrays(tmp_path):
    path = random_siglip(tmp_path) / "model.safetensors"
    state = files.read_state(path)
    missing = "encoder.layers.1.self_attn.k_proj.weight"
    changed = {name: array for name, array in state.items() if name != missing}
    changed |= {"surprise": np.ones(1, np.float32), "head.probe": np.ones(1, np.float32)}
    files.write_safetensors(path, changed, {})
    with pytest.raises(UserError, match=f"missing.*{missing}.*unknown.*surprise"):
        teacher_loading.load(str(path))
    patches = "embeddings.patch_embedding.weight"
    files.write_safetensors(path, state | {patches: state[patches].reshape(16, 96)}, {})
    with pytest.raises(UserError, match="cannot reshape"):
        teacher_loading.load(str(path))
    vit_names = {"encoder.layer.0.layernorm_before.weight": np.ones(3, np.float32)}
    files.write_safetensors(path, vit_names, {})
    with pytest.raises(UserError, match="teacher.*SiglipModel"):
        teacher_loading.load(str(path))


def test_flops_of_a_gated_tower_with_registers(monkeypatch):
    tower = teacher_vit.TeacherArchitecture(
        image_size=64, patch=8, width=384, depth=2, heads=3, mlp_width=512, out_width=None,
        activation="swiglu", registers=4, pre_norm=False, layer_scale=True,
    )  # fmt: skip
    shapes = teacher_loading.parameter_shapes(tower)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = mapping.unflatten(
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    )
    scan = vit.nn.scan
    monkeypatch.setattr(
        vit.nn, "scan", lambda *args, **options: scan(*args, **options | {"unroll": 8})
    )
    program = jax.jit(teacher_vit.TeacherViT(tower).apply).lower({"params": params}, images)
    compiled = program.compile().cost_analysis()["flops"]
    assert compiled == pytest.approx(flops.teacher_flops(tower), rel=0.05)


@pytest.mark.slow
def test_training_on_a_teacher_without_cls(tmp_path):
    """SigLIP runs within the step; its stored tokens give the same losses and gradients."""
    dataset = image_dataset(tmp_path, per_class=8)
    weights = random_siglip(tmp_path / "siglip")
    store = token_store(tmp_path, dataset, weights)
    info = StoreInfo.load(store).teacher
    assert (info.cls, info.tokens, info.width) == (False, 16, 32)
    settings = dict(
        total="2 steps", batch_size=8, dtype="float32", log_every=1, model=TINY,
        optim={"warmup": "1 steps"}, evals={"every": "2 steps"},
    )  # fmt: skip
    data = {"path": str(dataset), "targets": "online", "threads": 2}
    run = parse(TrainConfig, settings | {"data": data, "teacher": {"weights": str(weights)}})
    assert train.train(run, tmp_path / "run") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"visible"') == 2
    online = open_pretrain(run)
    stored = open_pretrain(
        parse(TrainConfig, settings | {"data": {"path": str(store), "threads": 2}})
    )
    params = stored.init(jax.random.key(0))
    batch = next(loader.train_batches(stored.examples, 8, rows=np.arange(8), start_step=0))
    (_, losses), gradients = jax.jit(jax.value_and_grad(stored.loss, has_aux=True))(
        params, {}, batch
    )
    _, expected = jax.jit(online.loss)(params, online.frozen, batch)
    for name in ("next", "visible"):
        np.testing.assert_allclose(losses[name], expected[name], atol=0.01)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.any(gradients["encoder"]["patch_embed"]["kernel"])


def test_the_siglip_layout_is_one_to_one(tmp_path):
    loaded = teacher_loading.load(str(random_siglip(tmp_path)))
    flat = mapping.flatten(loaded.params)
    state = mapping.write(siglip.entries(loaded.tower.depth), flat)
    assert files.hash_state(state) == loaded.hash
