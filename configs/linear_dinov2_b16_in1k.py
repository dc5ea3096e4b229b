"""DINOv2's linear probe (dinov2/eval/linear.py) of a frozen ViT-B/16: a grid in one run.

    python -m dgpt_jax.train --config=configs/linear_dinov2_b16_in1k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

52 linear heads share one forward pass: 13 base learning rates × four kinds of features after the
final norm (CLS of the last block or of the last four, with or without the mean of the patch
tokens). SGD, momentum 0.9, no weight decay, no warm-up, cosine to 0; 12,500 steps (10 of DINOv2's
"epochs" of 1,250); random resized crops and flips. Batch 1024 stands for DINOv2's 128 per GPU on
eight GPUs. As in DINOv2, the best head is selected on the validation set that its accuracy is
reported on; the results list all heads.

`:L/14` and `:H/14` probe these sizes. The paper's 85.9 is for ViT-H after ImageNet-21K, by the
protocols of BEiTv2 and AIM. Ours: not run on any hardware.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

SIZES = ("B/16", "L/14", "H/14")
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def get_config(size: str = SIZES[0]):
    check_choice("the size of this config", size, SIZES)
    config = default_config(TrainConfig)
    config.task = "classify"
    config.model.size = size
    config.total = "12500 steps"
    config.batch_size = 1024
    config.optim.kind = "sgd"
    config.optim.base_lr_grid = RATES
    config.optim.warmup = "0 steps"
    config.optim.weight_decay = 0.0
    config.init.weights = f"pretrained_{size.lower().replace('/', '')}_in1k"
    config.classify.trainable = "head"
    config.classify.head = "dinov2"
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
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "1250 steps"
    config.checkpoint.best = "val/top1"
    return config
