"""Token store of ImageNet-1K for OpenCLIP ViT-H/14 (laion2b_s32b_b79k), D-iGPT's best teacher.

    python tools/build_tokens.py --config=configs/tokens_in1k_openclip_h14.py \\
        --out=gs://BUCKET/tokens --config.source=gs://BUCKET/imagenet2012/5.1.0 \\
        --config.teacher.weights=CLIP-ViT-H-14-laion2B-s32B-b79K

Weights: the Hugging Face repository of that name (open_clip_model.safetensors and
open_clip_config.json). 1,281,167 images; 289 kB per image and view (263 kB of int8 tokens and a
JPEG), so 370 GB per view in 157 shards of 2.4 GB. The teacher takes 335 GFLOP per image: at half of
its peak a v5e chip builds 290 images per second, 64 chips a view in 70 s; decoding images that fast
takes 20 CPU cores. On a pod, start the same command on every worker. Not run by us: it needs
ImageNet and these weights.
"""

from dgpt_jax.config import TokensConfig, default_config


def get_config():
    config = default_config(TokensConfig)
    config.source = "imagenet2012"
    config.views = 1
    config.teacher.weights = "CLIP-ViT-H-14-laion2B-s32B-b79K"
    config.teacher.dtype = "bfloat16"
    config.batch_size = 64
    config.threads = 32
    return config
