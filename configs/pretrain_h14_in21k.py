"""D-iGPT ViT-H/14 on ImageNet-21K, 150 epochs (paper, section 4.3).

    python -m dgpt_jax.train --config=configs/pretrain_h14_in21k.py:v5p-128 --workdir=DIR \\
        --config.data.path=TOKENS

Peak learning rate 1.5e-3, 5 epochs of warm-up. For the paper's 90.0, 60 epochs of supervised
training on ImageNet-21K and fine-tuning on ImageNet-1K follow. The patch size of the paper's ViT-H
is not stated; 14 is ours. Ours: not run.

By `tools/plan.py` with POD and its topology (libtpu 0.0.42.1; times are lower bounds from data
sheets, beside which nothing has been measured yet):

    pod      topology   images a chip   GiB a chip    ms a step, at least   days, at least
    v5p-128  v5p:4x4x4       64          25.4 of 95.7         119 (compute)      0.72
    v5e-256  v5e:16x16       16           4.0 of 15.8          70 (compute)      0.42
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

PODS = ("v5p-128", "v5e-256")


def get_config(pod=PODS[0]):
    one_of("the pod of this config", pod, PODS)
    config = default(Train)
    config.model.size = "H/14"
    config.total = "150 epochs"
    config.batch_size = 4096
    if pod == "v5e-256":
        config.mesh.data, config.mesh.fsdp = -1, 16  # weights and optimizer do not fit one chip
    config.optim.blr = 1.5e-3 * 256 / 4096
    config.optim.warmup = "5 epochs"
    config.checkpoint.every = "1 epochs"
    config.evals.every = "10 epochs"
    config.data.path = "tokens_in21k"
    config.data.examples = 14197122  # the release of 2011, of 21,841 classes
    config.teacher.width = 1024  # OpenCLIP ViT-H/14: what the store must hold
    config.teacher.grid = 16
    return config
