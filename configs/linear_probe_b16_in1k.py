"""MAE's linear probe (main_linprobe.py) of a frozen ViT-B/16 on ImageNet-1K.

    python -m dgpt_jax.train --config=configs/linear_probe_b16_in1k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

LARS, batch 16384, base learning rate 0.1 (peak 6.4), no weight decay, 90 epochs, 10 of warm-up (50
epochs for L and H); batch-normalized CLS features; random resized crops and flips. The paper uses
the protocols of BEiTv2 and AIM instead and reports one number, 85.9 for ViT-H after ImageNet-21K.
Ours: not run on any hardware.
"""

from dgpt_jax.config import TrainConfig, default_config


def get_config():
    config = default_config(TrainConfig)
    config.task = "classify"
    config.model.size = "B/16"
    config.total = "90 epochs"
    config.batch_size = 16384
    config.optim.kind = "lars"
    config.optim.blr = 0.1
    config.optim.warmup = "10 epochs"
    config.optim.weight_decay = 0.0
    config.init.weights = "pretrained_b16_in1k"
    config.classify.trainable = "head"
    config.classify.pooling = "cls"
    config.classify.drop_path = 0.0
    config.classify.label_smoothing = 0.0
    config.classify.randaugment = ""
    config.classify.random_erase_prob = 0.0
    config.classify.mixup = 0.0
    config.classify.cutmix = 0.0
    config.data.path = "imagenet2012"
    config.data.examples = 1281167
    config.data.crop_scale = (0.08, 1.0)
    config.data.crop_clip = True
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "5 epochs"
    config.checkpoint.best = "val/top1"
    return config
