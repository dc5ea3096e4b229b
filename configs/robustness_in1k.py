"""Fine-tuned weights on ImageNet's test sets: val, ReaL, V2, A, R, Sketch, C, Hard, ObjectNet.

    python -m dgpt_jax.evaluate --config=configs/robustness_in1k.py --checkpoint=WITH_HEAD \\
        --config.data=DIR

Evaluates every test set below DIR by its own rules and prints how to get each missing one. Resize
256 (bicubic, shorter side), center crop 224; ImageNet-C: the central 224 pixels of the stored
images. `--config.squash=True` resizes both sides, as the official code does after fine-tuning;
results of both go into one file. Paper (table 2), ViT-B: IN 86.2, V2 76.4, ReaL 89.6, A 56.3, R
64.3, C 29.9 (probably the plain mean error), Sketch 48.5, Hard 31.1; ours: not run.
"""

from dgpt_jax.config import EvaluateConfig, default_config


def get_config():
    config = default_config(EvaluateConfig)
    config.protocol = "robustness"
    config.data = "imagenet_test_sets"
    return config
