"""kNN on ImageNet-1K by DINOv2's protocol: L2-normalized features, k 10/20/100/200, T 0.07.

    python -m dgpt_jax.evaluate --config=configs/knn_in1k.py --checkpoint=DIR_OR_WEIGHTS \\
        --config.data=imagenet2012

Resize 256 (bicubic, shorter side), center crop 224; separate results for CLS features and for the
mean of the patch tokens. The paper reports no such number for D-iGPT; ours: not run.
"""

from dgpt_jax.config import EvaluateConfig, default_config


def get_config():
    config = default_config(EvaluateConfig)
    config.protocol = "knn"
    config.data = "imagenet2012"
    config.train = "train"
    config.test = "validation"
    return config
