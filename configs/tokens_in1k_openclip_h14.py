"""Token store of ImageNet-1K for OpenCLIP ViT-H/14 (laion2b_s32b_b79k), D-iGPT's best teacher.

    python tools/build_tokens.py --config=configs/tokens_in1k_openclip_h14.py \\
        --out=gs://BUCKET/tokens --config.source=gs://BUCKET/imagenet2012 \\
        --config.teacher.weights=CLIP-ViT-H-14-laion2B-s32B-b79K

Weights: the Hugging Face repository of that name (open_clip_model.safetensors and
open_clip_config.json). 1,281,167 images; about 0.29 MB a view (int8 tokens 263 kB and the picture),
so 370 GB a view. Teacher: 335 GFLOP an image. Not run by us: no ImageNet, no such weights here.
"""

from dgpt_jax.config import Tokens
from dgpt_jax.schema import default


def get_config():
    config = default(Tokens)
    config.source = "imagenet2012"
    config.views = 1
    config.teacher.weights = "CLIP-ViT-H-14-laion2B-s32B-b79K"
    config.teacher.dtype = "bfloat16"
    config.batch_size = 256
    return config
