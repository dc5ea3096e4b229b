"""Fine-tuned weights on ImageNet's test sets: val, ReaL, V2, A, R, Sketch, C, Hard, ObjectNet.

    python -m dgpt_jax.evaluate --config=configs/robustness_in1k.py --checkpoint=WITH_HEAD \\
        --config.data=DIR

Every set that is below DIR is measured by its own rule, and a line for each that is not says how to
get it. Resize 256 (bicubic, shorter side), centre crop 224; ImageNet-C: the central 224 pixels as
they are stored. `--config.squash=True` resizes both sides, as the official code does after
fine-tuning; results of both go into one file. The paper (table 2), ViT-B: IN 86.2, V2 76.4, ReaL
89.6, A 56.3, R 64.3, C 29.9 (in all likelihood the plain mean error), Sketch 48.5, Hard 31.1; ours:
not run.
"""

from dgpt_jax.config import Evaluate
from dgpt_jax.schema import default


def get_config():
    config = default(Evaluate)
    config.protocol = "robustness"
    config.data = "imagenet_test_sets"
    return config
