"""The supervised stage on ImageNet-21K between pretraining and fine-tuning, ViT-L/14.

    python -m dgpt_jax.train --config=configs/finetune_l14_in21k.py --workdir=DIR \\
        --config.classify.weights=PRETRAINED --config.data.path=IMAGENET21K

60 epochs are the paper's (section 4.3), which gives nothing else. Batch 4096, learning rate 6e-4,
layer decay 0.75, drop path 0.2 are BEiTv2's for its ViT-L; no mixup, no cutmix and 5 epochs of
warm-up are ours. 21,841 classes of the release of 2011, which has no validation split: evaluate the
model after it has been fine-tuned on ImageNet-1K (configs/finetune_l14_in1k.py:in21k; in the paper
89.5). Ours: not run, on no hardware.
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default


def get_config():
    config = default(Train)
    config.task = "classify"
    config.model.size = "L/14"
    config.total = "60 epochs"
    config.batch_size = 4096
    config.optim.blr = 6e-4 * 256 / 4096
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-6
    config.optim.layer_decay = 0.75
    config.optim.b2 = 0.999
    config.classify.weights = "pretrained_l14_in21k"
    config.classify.num_classes = 21841
    config.classify.drop_path = 0.2
    config.classify.mixup = 0.0
    config.classify.cutmix = 0.0
    config.checkpoint.every = "1 epochs"
    config.data.path = "imagenet21k"
    config.data.examples = 14197122
    config.data.crop_scale = (0.08, 1.0)
    return config
