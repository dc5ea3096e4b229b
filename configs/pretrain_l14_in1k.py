"""D-iGPT ViT-L/14 on ImageNet-1K, 300 epochs (paper, section 4).

    python -m dgpt_jax.train --config=configs/pretrain_l14_in1k.py:v5e-64 --workdir=DIR \\
        --config.data.path=TOKENS

The recipe is B/16's. The patch size of the paper's ViT-L is not stated; 14 is ours: its grid is the
teacher's. Fine-tuned accuracy in the paper: 87.8. Ours: not run.

By `tools/plan.py` with POD and its topology (libtpu 0.0.42.1; times are lower bounds from data
sheets, beside which nothing has been measured yet):

    pod      topology   images a chip   GiB a chip    ms a step, at least   days, at least
    v5e-64   v5e:8x8      2 x 32         12.0 of 15.8         151 (compute)      0.16
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

PODS = ("v5e-64",)


def get_config(pod=PODS[0]):
    one_of("the pod of this config", pod, PODS)
    config = default(Train)
    config.model.size = "L/14"
    config.total = "300 epochs"
    config.batch_size = 4096
    config.accum_steps = 2
    config.optim.blr = 1.5e-4
    config.optim.warmup = "40 epochs"
    config.data.path = "tokens_in1k"
    config.data.examples = 1281167
    config.teacher.width = 1024  # OpenCLIP ViT-H/14: what the store must hold
    config.teacher.grid = 16
    return config
