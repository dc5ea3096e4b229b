"""DINOv2's linear probe (dinov2/eval/linear.py) of a frozen ViT on ImageNet-1K: a grid in one run.

    python -m dgpt_jax.train --config=configs/linear_dinov2_b16_in1k.py --workdir=DIR \\
        --config.classify.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

52 linear heads read one forward pass: 13 base learning rates on each of four kinds of normed
features, CLS of the last or of the last four blocks, without or with the mean of the patch tokens.
SGD, momentum 0.9, no decay, no warm-up, cosine to 0; 12,500 steps (10 of DINOv2's "epochs" of
1,250); random resized crops and flips. Batch 1024 is 128 a GPU on eight of them. As in DINOv2, the
best head is chosen by the very images that its accuracy is of, and every head's is in the results.

`:L/14` and `:H/14` probe these sizes. The paper's 85.9 is of ViT-H after ImageNet-21K, by BEiTv2's
and AIM's protocols. Ours: not run, on no hardware.
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

SIZES = ("B/16", "L/14", "H/14")
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def get_config(size=SIZES[0]):
    one_of("the size of this config", size, SIZES)
    config = default(Train)
    config.task = "classify"
    config.model.size = size
    config.total = "12500 steps"
    config.batch_size = 1024
    config.optim.kind = "sgd"
    config.optim.grid = RATES
    config.optim.warmup = "0 steps"
    config.optim.weight_decay = 0.0
    config.classify.weights = f"pretrained_{size.lower().replace('/', '')}_in1k"
    config.classify.train = "head"
    config.classify.head = "dinov2"
    config.classify.pooling = "cls"
    config.classify.drop_path = 0.0
    config.classify.smoothing = 0.0
    config.classify.randaugment = ""
    config.classify.erase = 0.0
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
