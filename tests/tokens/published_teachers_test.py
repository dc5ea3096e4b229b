"""Teachers at full width through a build: stored float16 tokens against the reference's."""

import json
from functools import partial

import numpy as np
import pytest

from dgpt_jax.config import TokensConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import image_ops, token_codec
from dgpt_jax.data.ingest import importer
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.models import vit
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import build
from dgpt_jax.weights import teacher_loading
from tests.support import photographs
from tests.support import reference_teachers as teachers

pytest.importorskip("torch")
pytest.importorskip("transformers")

DEPTH = {"num_hidden_layers": 2, "image_size": 224}
# Builder at full width and two blocks, size of its input, settings that its files lack.
FULL = {
    "DINOv3 S/16": (
        partial(teachers.dinov3, hidden_size=384, intermediate_size=1536, num_attention_heads=6,
                patch_size=16, **DEPTH), 224, {},
    ),
    "DINOv3 B/16": (
        partial(teachers.dinov3, hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                patch_size=16, **DEPTH), 224, {},
    ),
    "DINOv3 L/16": (
        partial(teachers.dinov3, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                patch_size=16, **DEPTH), 224, {},
    ),
    "DINOv3 H+/16 by Meta": (
        partial(teachers.dinov3_original, gated=True, hidden_size=1280, intermediate_size=5120,
                num_attention_heads=20, patch_size=16, **DEPTH), 224, {"image_size": 224},
    ),
    "DINOv3 L/16 by timm": (
        partial(teachers.dinov3_timm, name="vit_large_patch16_dinov3", depth=2), 224,
        {"image_size": 224},
    ),
    "PE-core B/16": (
        partial(teachers.pe_core, name="vit_pe_core_base_patch16_224", depth=2), 224, {},
    ),
    "PE-core L/14": (
        partial(teachers.pe_core, name="vit_pe_core_large_patch14_336", depth=2), 336, {},
    ),
    "EVA-02-CLIP L/14": (
        partial(teachers.eva02_clip, name="eva02_large_patch14_clip_224", depth=2), 224, {},
    ),
    "AIMv2 L/14": (
        partial(teachers.aimv2, hidden_size=1024, intermediate_size=2816, num_attention_heads=8,
                patch_size=14, **DEPTH), 224, {},
    ),
    "SigLIP So400m/14 in OpenCLIP": (
        partial(teachers.open_clip_trunk, name="vit_so400m_patch14_siglip_224", depth=2), 224, {},
    ),
    "C-RADIOv4 H/16": (
        partial(teachers.radio, hidden_size=1280, intermediate_size=5120, num_attention_heads=16,
                patch_size=16, max_img_size=2048, num_cls_tokens=3, num_registers=7, **DEPTH),
        224, {"image_size": 224, "mean": (0.0,) * 3, "std": (1.0,) * 3},
    ),
    "TIPSv2 L/14": (
        partial(teachers.tips, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                patch_size=14, **DEPTH | {"image_size": 448}), 224, {"image_size": 224},
    ),
    "SigLIP 2 So400m/16 NaFlex": (
        partial(teachers.naflex, hidden_size=1152, intermediate_size=4304, num_attention_heads=16,
                patch_size=16, num_patches=256, **DEPTH), 256, {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    photographs.write(root / "folder", 6)
    importer.import_images(root / "folder", root / "images", say=lambda _: 0)
    return root / "images"


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL)
def test_stored_tokens_are_those_of_the_reference(source, tmp_path, case):
    make, size, given = FULL[case]
    (tmp_path / "teacher").mkdir()
    reference = make(tmp_path / "teacher")
    teacher = {"weights": str(tmp_path / "teacher"), "dtype": "float32", **given}
    settings = dict(
        source=str(source), teacher=teacher, image_size=size, codec="float16", batch_size=6,
        image_encoding="png",
    )  # fmt: skip
    store = tmp_path / "store"
    build.build(parse(TokensConfig, settings), store, check=False)
    info, split = StoreInfo.load(store), tfds_dataset.Split(store, "view000")
    examples = [split[i] for i in range(6)]
    codec = info.teacher.load_codec(store)
    stored = np.stack([np.asarray(codec.decode(e["tokens"])) for e in examples])
    images = np.stack([image_ops.decode_image(e["image"]) for e in examples])
    tower = teacher_loading.load_configured(parse(TokensConfig, settings).teacher).tower
    expected = reference(np.asarray(vit.normalize(images, tower.mean, tower.std)))
    assert stored.shape == expected.shape and tower.depth == 2
    cosine = token_codec.cosines(stored, expected)
    print(f"{case}: width {tower.width}, {stored.shape[1]} tokens, least cosine {cosine.min():.7f}")
    assert cosine.min() > 0.9999
    assert info.teacher.weights["tower"] == json.loads(json.dumps(tower.describe()))
