"""Supervised ViT-L/14 training on ImageNet-21K, between pretraining and fine-tuning.

    python -m dgpt_jax.train --config=configs/finetune_l14_in21k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET21K

The paper (section 4.3) gives only the length, 60 epochs. Batch 4096, learning rate 6e-4, layer
decay 0.75 and drop path 0.2 are BEiTv2's for ViT-L; no mixup, no CutMix and 5 epochs of warm-up are
ours. The 2011 release has 21,841 classes and no validation split: evaluate after fine-tuning on
ImageNet-1K (configs/finetune_l14_in1k.py:in21k; paper: 89.5). Ours: not run on any hardware.
"""

from dgpt_jax.config import TrainConfig, default_config


def get_config():
    config = default_config(TrainConfig)
    config.task = "classify"
    config.model.size = "L/14"
    config.total = "60 epochs"
    config.batch_size = 4096
    config.optim.blr = 6e-4 * 256 / 4096
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-6
    config.optim.layer_decay = 0.75
    config.optim.b2 = 0.999
    config.init.weights = "pretrained_l14_in21k"
    config.classify.num_classes = 21841
    config.classify.drop_path = 0.2
    config.classify.mixup = 0.0
    config.classify.cutmix = 0.0
    config.checkpoint.every = "1 epochs"
    config.data.path = "imagenet21k"
    config.data.examples = 14197122
    config.data.crop_scale = (0.08, 1.0)
    return config
