"""D-iGPT ViT-L/14 on ImageNet-1K, 300 epochs (paper, section 4).

    python -m dgpt_jax.train --config=configs/pretrain_l14_in1k.py:v5e-64 --workdir=DIR \\
        --config.data.path=TOKENS

Recipe of B/16. The paper does not state the patch size of its ViT-L; 14 is ours and gives the grid
of the teacher. Fine-tuned accuracy in the paper: 87.8. Ours: not run.

Estimates of `tools/plan.py` for each pod (libtpu 0.0.42.1; times are lower bounds from data sheets,
not measured on TPUs):

    pod      topology   images per chip   GiB per chip    ms per step, at least   days, at least
    v5e-64   v5e:8x8      2 x 32          12.0 of 15.8           151 (compute)         0.16
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

PODS = ("v5e-64",)


def get_config(pod: str = PODS[0]):
    check_choice("the pod of this config", pod, PODS)
    config = default_config(TrainConfig)
    config.model.size = "L/14"
    config.total = "300 epochs"
    config.batch_size = 4096
    config.accum_steps = 2
    config.optim.blr = 1.5e-4
    config.optim.warmup = "40 epochs"
    config.data.path = "tokens_in1k"
    config.data.examples = 1281167
    config.teacher.width = 1024  # OpenCLIP ViT-H/14, checked against the store
    config.teacher.grid = 16
    return config
