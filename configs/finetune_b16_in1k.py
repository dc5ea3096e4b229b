"""Fine-tuning D-iGPT's ViT-B/16 on ImageNet-1K: the official recipe (main_finetune.py, README).

    python -m dgpt_jax.train --config=configs/finetune_b16_in1k.py --workdir=DIR \\
        --config.classify.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

Batch 1024, peak learning rate 4e-4, layer decay 0.65, 100 epochs, 5 of warm-up. The official code
mixes the 128 pictures of a GPU alike, resizes validation pictures to 256×256 before the crop
(val/top1_squash) and reports the best epoch: 86.2 with the authors' PyTorch on GPUs, 85.9 by their
own run on TPU. The last epoch and the usual resize (val/top1) are printed beside it. Ours: not run.
The authors used 8 GPUs; no hardware of ours has run it. `tools/plan.py` tells what it needs.

`configs/finetune_b16_in1k.py:384` does the same at 384 pixels with resized positions, for which
the paper has no number; evaluation then takes the whole picture, as the official code does.
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

SIZES = ("224", "384")


def get_config(size=SIZES[0]):
    one_of("the image size of this config", size, SIZES)
    config = default(Train)
    config.task = "classify"
    config.model.size = "B/16"
    config.model.image_size = int(size)
    config.total = "100 epochs"
    config.batch_size = 1024
    config.optim.blr = 1e-4
    config.optim.warmup = "5 epochs"
    config.optim.min_lr = 1e-6
    config.optim.layer_decay = 0.65
    config.optim.b2 = 0.999
    config.classify.weights = "pretrained_b16_in1k"
    config.classify.drop_path = 0.1
    config.data.path = "imagenet2012"
    config.data.examples = 1281167
    config.data.crop_scale = (0.08, 1.0)
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "1 epochs"
    config.checkpoint.best = "val/top1_squash"
    return config
