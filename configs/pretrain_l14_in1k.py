"""D-iGPT ViT-L/14 on ImageNet-1K, 300 epochs (paper, section 4).

    python -m dgpt_jax.train --config=configs/pretrain_l14_in1k.py:v5e-64 --workdir=DIR \\
        --config.data.path=TOKENS

The recipe is B/16's; the patch size of the paper's ViT-L is not stated, 14 is ours: its grid is the
teacher's. Fine-tuned accuracy in the paper: 87.8. Ours: not run.
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of


def get_config(pod="v5e-64"):
    one_of("the pod of this config", pod, ("v5e-64",))
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
