"""Fine-tunes or probes the quickstart's encoder on 32×32 images on a laptop's CPU.

    python -m dgpt_jax.train --config=configs/quickstart_finetune.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGES \\
        --config.evals.heldout=IMAGES

After tools/quickstart.sh, PRETRAINED is quickstart_run/runs/both and IMAGES is
quickstart_run/images. 200 steps take 70 s of one core. Accuracy at the end, one seed:

    720 held-out scenes (the default)         45.0 %; from random weights 9.4 %
    360 held-out digits (--images=digits)     94.7 %; from random weights 46.9 %

Random weights: --config.init.weights= (empty).

`:linear`, `:dinov2` and `:attentive` train heads on the frozen encoder by the protocols of
configs/linear_probe_b16_in1k.py, linear_dinov2_b16_in1k.py and attentive_b16_in1k.py, in 400 steps
of 64 images. Results: docs/guides/evaluation.md.
"""

from ml_collections import ConfigDict

from dgpt_jax.config import TrainConfig, check_choice, default_config

HEADS = ("none", "linear", "dinov2", "attentive")
LINEAR = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
ATTENTIVE = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)


def get_config(head: str = HEADS[0]):
    check_choice("the head of this config", head, HEADS)
    config = default_config(TrainConfig)
    config.task = "classify"
    config.total = "200 steps"
    config.batch_size = 64
    config.dtype = "float32"
    config.platform = "cpu"
    config.log_every = 20
    config.model.image_size = 32
    config.model.patch = 8
    config.model.width = 96
    config.model.depth = 6
    config.model.heads = 3
    config.model.remat = "full"
    config.optim.blr = 4e-3  # × 64 / 256 = 1e-3
    config.optim.warmup = "10%"
    config.optim.min_lr = 1e-5
    config.optim.layer_decay = 0.75
    config.optim.b2 = 0.999
    config.init.weights = "quickstart_run/runs/both"
    config.classify.num_classes = 10
    config.classify.randaugment = "rand-m5-mstd0.5-inc1"
    config.classify.mixup_group_size = 64
    config.classify.resize = 32
    config.data.path = "quickstart_run/images"
    config.data.threads = 2
    config.data.crop_scale = (0.5, 1.0)
    config.data.flip = False  # a mirrored 2 is not a 2
    config.evals.heldout = "quickstart_run/images"
    config.evals.every = "25%"
    config.checkpoint.every = "50%"
    config.checkpoint.best = "val/top1"
    if head != "none":
        probe(config, head)
    return config


def probe(config: ConfigDict, head: str):
    """Trains heads only, with crops as the only augmentation and the protocols' learning rates for
    batch 1024 (MAE: 16384)."""
    config.total = "400 steps"
    config.optim.layer_decay = 1.0
    config.classify.trainable = "head"
    config.classify.head = head
    config.classify.pooling = "mean" if head == "attentive" else "cls"
    config.classify.randaugment = ""
    for name in ("drop_path", "label_smoothing", "random_erase_prob", "mixup", "cutmix"):
        config.classify[name] = 0.0
    if head == "attentive":
        config.optim.base_lr_grid = tuple(4 * rate for rate in ATTENTIVE)  # × 64 / 256: the peaks
        config.optim.weight_decay = 0.1
        config.optim.clip_norm = 3.0
        return
    config.optim.min_lr = 0.0
    config.optim.weight_decay = 0.0
    config.optim.kind = "lars" if head == "linear" else "sgd"
    if head == "linear":
        config.optim.blr = 25.6  # × 64 / 256 = 6.4
    else:
        config.optim.warmup = "0 steps"
        config.optim.base_lr_grid = tuple(16 * rate for rate in LINEAR)
