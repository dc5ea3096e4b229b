"""Fine-tunes D-iGPT's ViT-L/14 on ImageNet-1K. For L the paper gives only the length, 100 epochs.

    python -m dgpt_jax.train --config=configs/finetune_l14_in1k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

Settings of MILAN's ViT-L, whose ViT-B recipe D-iGPT uses: blr 1e-4, layer decay 0.75, drop path
0.2, 100 epochs, 5 of warm-up; the rest is as for B/16. Paper: 87.8. Ours: not run on any hardware.

`:in21k` fine-tunes weights from configs/finetune_l14_in21k.py with the settings of BEiTv2's ViT-L
after its ImageNet-21K stage: 20 epochs, learning rate 7e-5, layer decay 0.8, drop path 0.25, no
mixup, no CutMix; batch 1024 and 2 epochs of warm-up are ours. Paper: 89.5, hyperparameters not
given. Ours: not run.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

DATASETS = ("in1k", "in21k")


def get_config(dataset: str = DATASETS[0]):
    check_choice("the pretraining dataset of this config", dataset, DATASETS)
    config = default_config(TrainConfig)
    config.task = "classify"
    config.model.size = "L/14"
    config.total = "100 epochs"
    config.batch_size = 1024
    config.optim.blr = 1e-4
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-6
    config.optim.layer_decay = 0.75
    config.optim.b2 = 0.999
    config.init.weights = f"pretrained_l14_{dataset}"
    config.classify.drop_path = 0.2
    if dataset == "in21k":
        config.total = "20 epochs"
        config.optim.blr = 7e-5 * 256 / 1024
        config.optim.warmup = "2 epochs"
        config.optim.layer_decay = 0.8
        config.classify.drop_path = 0.25
        config.classify.mixup = 0.0
        config.classify.cutmix = 0.0
    config.data.path = "imagenet2012"
    config.data.examples = 1281167
    config.data.crop_scale = (0.08, 1.0)
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "1 epochs"
    config.checkpoint.best = "val/top1_squash"
    return config
