"""Linear probe on frozen ImageNet-1K features: logistic regression, cross-validated regularization.

    python -m dgpt_jax.evaluate --config=configs/linear_in1k.py --checkpoint=DIR_OR_WEIGHTS \\
        --config.data=imagenet2012

Resize 256 (bicubic, shorter side), center crop 224; separate results for CLS features and for the
mean of the patch tokens. The paper reports no such number for D-iGPT; ours: not run.
"""

from dgpt_jax.config import EvaluateConfig, default_config


def get_config():
    config = default_config(EvaluateConfig)
    config.protocol = "linear"
    config.data = "imagenet2012"
    config.train = "train"
    config.test = "validation"
    return config
