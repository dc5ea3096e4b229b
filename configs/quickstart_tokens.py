"""Tokens of the quickstart's small teacher for 32×32 scenes; part of tools/quickstart.sh.

    python tools/build_tokens.py --config=configs/quickstart_tokens.py --out=DIR \\
        --config.source=IMAGES --config.teacher.weights=TEACHER
"""

from dgpt_jax.config import TokensConfig, default_config


def get_config():
    config = default_config(TokensConfig)
    config.views = 2
    config.image_size = 32
    config.image_encoding = "png"
    config.crop_scale = (0.8, 1.0)
    config.flip = False  # a mirrored 2 is not a 2
    config.codec = "int8"
    config.shard_size = 512
    config.platform = "cpu"
    return config
