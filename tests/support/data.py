"""Small datasets and models for tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dgpt_jax.config import ModelConfig, TokensConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data.ingest import importer
from dgpt_jax.models import teacher_vit
from dgpt_jax.storage import checksums
from dgpt_jax.tokens import build
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights.layouts import clip as clip_weights
from dgpt_jax.weights.layouts import siglip

# 16×16 pixels, 4×4 patches, 2×2 segments of 2×2 patches.
TINY = dict(
    width=24,
    depth=3,
    heads=2,
    patch=4,
    image_size=16,
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=2,
)


def tiny_model(**changes) -> ModelConfig:
    return parse(ModelConfig, TINY | changes)


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random RGB image with structure at several scales, like photographs."""
    image = np.zeros((height, width, 3))
    for cells in (2, 4, 8):
        noise = (rng.random((cells, cells, 3)) * 255).astype(np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image += np.asarray(layer, float) / cells
    return (image / image.max() * 255).astype(np.uint8)


def write_folder(root, per_class: int, *, classes=("a", "b"), size=(24, 32), split="", seed=0):
    """Writes PNG files `root/[split/]class/i.png`; the mean color depends on the class."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            image = smooth_image(rng, *size) // 2
            image[..., label % 3] += 100
            Image.fromarray(image).save(folder / f"{i:03d}.png")


def image_dataset(root, per_class: int = 12, *, shard_size: int = 8, **kwargs):
    """Imports a labeled dataset with a train split of several shards. Returns its directory."""
    write_folder(root / "folder", per_class, **kwargs)
    importer.import_images(root / "folder", root / "images", shard_size=shard_size, say=lambda _: 0)
    return root / "images"


# 16×16 pixels, 4×4 patches like TINY's; 24 channels.
TOWER = teacher_vit.TeacherArchitecture(
    image_size=16, patch=4, width=32, depth=2, heads=2, mlp_width=64, out_width=24,
    activation="quick_gelu",
)  # fmt: skip


def random_teacher(directory, *, seed=0, tower=TOWER):
    """Saves a tower in OpenCLIP's layout with random weights, large enough for distinct tokens."""
    size = tower.image_size
    init = jax.jit(teacher_vit.TeacherViT(tower).init)
    params = init(jax.random.key(seed), jnp.zeros((1, size, size, 3)))["params"]
    params["patch_embed"]["kernel"] *= 10
    clip_weights.save(directory, params, tower)
    return directory


# The same sizes with SigLIP's architecture.
SIGLIP = teacher_vit.TeacherArchitecture(
    image_size=16, patch=4, width=32, depth=2, heads=2, mlp_width=64, out_width=None,
    activation="gelu_tanh", eps=1e-6, mean=(0.5,) * 3, std=(0.5,) * 3, cls=False, pre_norm=False,
    patch_bias=True,
)  # fmt: skip


def random_siglip(directory):
    """Saves SIGLIP with random weights in the layout of Hugging Face's SiglipVisionModel."""
    init = jax.jit(teacher_vit.TeacherViT(SIGLIP).init)
    params = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    params["patch_embed"]["kernel"] *= 10
    flat = {name: np.asarray(leaf) for name, leaf in mapping.flatten(params).items()}
    state = mapping.write(siglip.entries(SIGLIP.depth), flat)
    files.write_safetensors(directory / "model.safetensors", state, {"format": "pt"})
    config = {"num_attention_heads": SIGLIP.heads, "model_type": "siglip_vision_model"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def token_store(root, dataset, teacher, *, check=False, **changes):
    """Builds a token store `root/tokens` of 16×16 images; `changes` are fields of TokensConfig."""
    settings = dict(
        source=str(dataset), teacher={"weights": str(teacher)}, image_size=16, image_encoding="png",
        shard_size=16, batch_size=8, threads=2,
    )  # fmt: skip
    build.build(parse(TokensConfig, settings | changes), root / "tokens", check=check)
    return root / "tokens"


def edit_metadata(step_directory, edit):
    """Applies edit(metadata) to a checkpoint's metadata and updates its checksum."""
    path = step_directory / "metadata/metadata"
    content = json.loads(path.read_text())
    content.pop("checksum")
    edit(content)
    path.write_text(json.dumps(content | {"checksum": checksums.of_json(content)}))
