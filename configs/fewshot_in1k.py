"""Few-shot ImageNet-1K by big_vision's protocol: regularized least squares on frozen features.

    python -m dgpt_jax.evaluate --config=configs/fewshot_in1k.py --checkpoint=DIR_OR_WEIGHTS \\
        --config.data=imagenet2012

1, 5, 10 and 25 labels per class from train[:65000], 3 seeds; papers cite 10 shots, averaged over
the seeds. TFDS's imagenet2012 is shuffled, so train[:65000] holds all classes; an imported folder
is sorted by class and needs --config.train=train.

Images are resized to 256×256 ignoring the aspect ratio, then cropped to the central 224 pixels. Two
differences from big_vision's `resize(256)|central_crop(224)|value_range(-1, 1)`: pixels are
normalized as the encoder was trained (value_range is that of big_vision's models), and resizing is
antialiased bicubic instead of bilinear without antialiasing. The paper reports no such number for
D-iGPT; ours: not run.
"""

from dgpt_jax.config import EvaluateConfig, default_config


def get_config():
    config = default_config(EvaluateConfig)
    config.protocol = "fewshot"
    config.data = "imagenet2012"
    config.train = "train[:65000]"
    config.test = "validation"
    config.squash = True
    config.shots = (1, 5, 10, 25)
    config.seeds = (0, 1, 2)
    return config
