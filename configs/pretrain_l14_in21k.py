"""D-iGPT ViT-L/14 on ImageNet-21K, 150 epochs (paper, section 4.3).

    python -m dgpt_jax.train --config=configs/pretrain_l14_in21k.py:v5p-128 --workdir=DIR \\
        --config.data.path=TOKENS

Peak learning rate 1.5e-3, 5 epochs of warm-up. The paper's 89.5 follows 60 epochs of supervised
training on ImageNet-21K and fine-tuning on ImageNet-1K. The paper does not state the patch size of
its ViT-L; 14 is ours. Ours: not run.

Estimates of `tools/plan.py` for each pod (libtpu 0.0.42.1; times are lower bounds from data sheets,
not measured on TPUs):

    pod      topology   images per chip   GiB per chip    ms per step, at least   days, at least
    v5p-128  v5p:4x4x4       64           14.7 of 95.7            65 (compute)         0.39
    v6e-64   v6e:8x8         64           14.5 of 31.3            64 (memory)          0.39
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

PODS = ("v5p-128", "v6e-64")


def get_config(pod: str = PODS[0]):
    check_choice("the pod of this config", pod, PODS)
    config = default_config(TrainConfig)
    config.model.size = "L/14"
    config.total = "150 epochs"
    config.batch_size = 4096
    config.optim.blr = 1.5e-3 * 256 / 4096
    config.optim.warmup = "5 epochs"
    config.checkpoint.every = "1 epochs"
    config.evals.every = "10 epochs"
    config.data.path = "tokens_in21k"
    config.data.examples = 14197122  # the 2011 release, 21,841 classes
    config.teacher.width = 1024  # OpenCLIP ViT-H/14, checked against the store
    config.teacher.grid = 16
    return config
