"""Token store of ImageNet-21K (2011 release, 14,197,122 images) for OpenCLIP ViT-H/14.

    python tools/import_images.py fall11_whole.tar --out=gs://BUCKET/imagenet21k
    python tools/build_tokens.py --config=configs/tokens_in21k_openclip_h14.py \\
        --out=gs://BUCKET/tokens21k --config.source=gs://BUCKET/imagenet21k \\
        --config.teacher.weights=CLIP-ViT-H-14-laion2B-s32B-b79K

4.1 TB per view as int8 (2.2 TB as int4) in 867 shards of 4.7 GB; the shards of two views stay below
usual limits on open files. 4.8 EFLOP per view: 13.6 chip-hours of a v5e at half of its peak. Raise
config.views later to add views. Not run by us.
"""

from dgpt_jax.config import TokensConfig, default_config


def get_config():
    config = default_config(TokensConfig)
    config.source = "imagenet21k"
    config.views = 1
    config.teacher.weights = "CLIP-ViT-H-14-laion2B-s32B-b79K"
    config.teacher.dtype = "bfloat16"
    config.batch_size = 64
    config.shard_size = 16384
    config.threads = 32
    return config
