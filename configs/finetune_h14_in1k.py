"""Fine-tunes D-iGPT's ViT-H/14 on ImageNet-1K. The paper gives no recipe for H.

    python -m dgpt_jax.train --config=configs/finetune_h14_in1k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

Layer decay 0.75, drop path 0.3, 50 epochs and 5 of warm-up are MAE's for ViT-H; blr 1e-4 is
D-iGPT's for B and MILAN's for L, a tenth of MAE's, whose targets are pixels. The paper's 90.0
follows 60 supervised epochs on ImageNet-21K (configs/finetune_l14_in21k.py with
--config.model.size=H/14). Ours: not run on any hardware.
"""

from dgpt_jax.config import TrainConfig, default_config


def get_config():
    config = default_config(TrainConfig)
    config.task = "classify"
    config.model.size = "H/14"
    config.total = "50 epochs"
    config.batch_size = 1024
    config.mesh.data, config.mesh.fsdp = -1, 8
    config.optim.blr = 1e-4
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-6
    config.optim.layer_decay = 0.75
    config.optim.b2 = 0.999
    config.init.weights = "pretrained_h14_in21k"
    config.classify.drop_path = 0.3
    config.data.path = "imagenet2012"
    config.data.examples = 1281167
    config.data.crop_scale = (0.08, 1.0)
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "1 epochs"
    config.checkpoint.best = "val/top1_squash"
    return config
