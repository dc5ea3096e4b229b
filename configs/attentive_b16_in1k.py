"""AIM's attentive probe (arXiv 2401.08541, table of its appendix) of a frozen ViT on ImageNet-1K.

    python -m dgpt_jax.train --config=configs/attentive_b16_in1k.py --workdir=DIR \\
        --config.classify.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

One learned query attends to the mean of the last six blocks' patch tokens, standardised by batch;
seven heads with a learning rate each read one forward pass. AdamW (0.9, 0.999), decay 0.1, batch
1024, each head clipped to norm 3, 50 epochs, 5 of warm-up, cosine to 1e-5; random resized crops,
flips, jitter 0.3 and RandAugment. AIM's code has the head and the evaluation; of the training there
is the table alone. So two things are ours: everything decays, and jitter comes after RandAugment
(timm, told of both, leaves jitter out). The evaluation uses running statistics. The best head is
chosen by the images that its accuracy is of, as AIM does; every head's is in the results.

`:L/14` and `:H/14` probe these sizes. AIM-0.6B has 78.5. Ours: not run, on no hardware.
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

SIZES = ("B/16", "L/14", "H/14")
RATES = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)  # peaks


def get_config(size=SIZES[0]):
    one_of("the size of this config", size, SIZES)
    config = default(Train)
    config.task = "classify"
    config.model.size = size
    config.total = "50 epochs"
    config.batch_size = 1024
    config.optim.grid = tuple(rate * 256 / 1024 for rate in RATES)
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-5
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.999
    config.optim.clip_norm = 3.0
    config.classify.weights = f"pretrained_{size.lower().replace('/', '')}_in1k"
    config.classify.train = "head"
    config.classify.head = "attentive"
    config.classify.drop_path = 0.0
    config.classify.smoothing = 0.0
    config.classify.jitter = (0.3, 0.3, 0.3)
    config.classify.erase = 0.0
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
