"""Few-shot ImageNet-1K by big_vision's protocol: regularised least squares on frozen features.

    python -m dgpt_jax.evaluate --config=configs/fewshot_in1k.py --checkpoint=DIR_OR_WEIGHTS \\
        --config.data=imagenet2012

1, 5, 10 and 25 labels a class out of train[:65000], 3 seeds; the number that is cited is 10 shots,
mean of the seeds. train[:65000] is of TFDS's imagenet2012, whose examples are mixed; a folder that
was imported is sorted by class, and then all of `train` must be taken.

Both sides are resized to 256 (squashed), then the central 224 pixels. Two things differ from
big_vision's line `resize(256)|central_crop(224)|value_range(-1, 1)`: pixels are normalised as the
encoder was trained (value_range is that of its own models), and resizing is antialiased bicubic,
not bilinear without antialiasing. The paper reports no such number for D-iGPT; ours: not run.
"""

from dgpt_jax.config import Evaluate
from dgpt_jax.schema import default


def get_config():
    config = default(Evaluate)
    config.protocol = "fewshot"
    config.data = "imagenet2012"
    config.train = "train[:65000]"
    config.test = "validation"
    config.squash = True
    config.shots = (1, 5, 10, 25)
    config.seeds = (0, 1, 2)
    return config
