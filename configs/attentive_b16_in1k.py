"""AIM's attentive probe (arXiv 2401.08541, hyperparameters in its appendix) of a frozen ViT-B/16.

    python -m dgpt_jax.train --config=configs/attentive_b16_in1k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

One learned query attends to the mean of the last six blocks' patch tokens, batch-normalized; seven
heads, each with its own learning rate, share one forward pass. AdamW (0.9, 0.999), weight decay
0.1, batch 1024, gradients of each head clipped to norm 3, 50 epochs, 5 of warm-up, cosine to 1e-5;
random resized crops, flips, jitter 0.3 and RandAugment. AIM released the head and the evaluation,
but no training code, so two choices are ours: every parameter decays, and jitter follows
RandAugment (timm drops jitter if both are set). Evaluation uses running statistics. As in AIM, the
best head is selected on the validation set that its accuracy is reported on; the results list all
heads.

`:L/14` and `:H/14` probe these sizes. AIM-0.6B: 78.5. Ours: not run on any hardware.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

SIZES = ("B/16", "L/14", "H/14")
RATES = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)  # peaks


def get_config(size: str = SIZES[0]):
    check_choice("the size of this config", size, SIZES)
    config = default_config(TrainConfig)
    config.task = "classify"
    config.model.size = size
    config.total = "50 epochs"
    config.batch_size = 1024
    config.optim.base_lr_grid = tuple(rate * 256 / 1024 for rate in RATES)
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-5
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.999
    config.optim.clip_norm = 3.0
    config.init.weights = f"pretrained_{size.lower().replace('/', '')}_in1k"
    config.classify.trainable = "head"
    config.classify.head = "attentive"
    config.classify.drop_path = 0.0
    config.classify.label_smoothing = 0.0
    config.classify.jitter = (0.3, 0.3, 0.3)
    config.classify.random_erase_prob = 0.0
    config.classify.mixup = 0.0
    config.classify.cutmix = 0.0
    config.data.path = "imagenet2012"
    config.data.examples = 1281167
    config.data.crop_scale = (0.08, 1.0)
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "5 epochs"
    config.checkpoint.best = "val/top1"
    return config
