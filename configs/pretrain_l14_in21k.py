"""D-iGPT ViT-L/14 on ImageNet-21K, 150 epochs (paper, section 4.3).

    python -m dgpt_jax.train --config=configs/pretrain_l14_in21k.py:v5p-128 --workdir=DIR \\
        --config.data.path=TOKENS

Peak learning rate 1.5e-3, 5 epochs of warm-up. For the paper's 89.5, 60 epochs of supervised
training on ImageNet-21K and fine-tuning on ImageNet-1K follow. The patch size of the paper's ViT-L
is not stated; 14 is ours. Ours: not run.

By `tools/plan.py` with POD and its topology (libtpu 0.0.42.1; times are lower bounds from data
sheets, beside which nothing has been measured yet):

    pod      topology   images a chip   GiB a chip    ms a step, at least   days, at least
    v5p-128  v5p:4x4x4       64          14.7 of 95.7          65 (compute)      0.39
    v6e-64   v6e:8x8         64          14.5 of 31.3          64 (memory)       0.39
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

PODS = ("v5p-128", "v6e-64")


def get_config(pod=PODS[0]):
    one_of("the pod of this config", pod, PODS)
    config = default(Train)
    config.model.size = "L/14"
    config.total = "150 epochs"
    config.batch_size = 4096
    config.optim.blr = 1.5e-3 * 256 / 4096
    config.optim.warmup = "5 epochs"
    config.checkpoint.every = "1 epochs"
    config.evals.every = "10 epochs"
    config.data.path = "tokens_in21k"
    config.data.examples = 14197122  # the release of 2011, of 21,841 classes
    config.teacher.width = 1024  # OpenCLIP ViT-H/14: what the store must hold
    config.teacher.grid = 16
    return config
