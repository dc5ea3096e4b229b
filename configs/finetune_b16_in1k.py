"""Fine-tunes D-iGPT's ViT-B/16 on ImageNet-1K by the official recipe (main_finetune.py, README).

    python -m dgpt_jax.train --config=configs/finetune_b16_in1k.py --workdir=DIR \\
        --config.init.weights=PRETRAINED --config.data.path=IMAGENET \\
        --config.evals.heldout=IMAGENET

Batch 1024, peak learning rate 4e-4, layer decay 0.65, 100 epochs, 5 of warm-up. The official code
draws mixup once per GPU (128 images), resizes validation images to 256×256 before the crop
(val/top1_squash) and reports the best epoch: 86.2 with the authors' PyTorch on GPUs, 85.9 in their
own TPU run. The last epoch and the usual resize (val/top1) are logged as well. Ours: not run on any
hardware; the authors used 8 GPUs. `tools/plan.py` estimates memory and time.

`configs/finetune_b16_in1k.py:384` fine-tunes at 384 pixels with interpolated position embeddings,
for which the paper has no number; evaluation then uses the whole image, as the official code does.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

SIZES = ("224", "384")


def get_config(size: str = SIZES[0]):
    check_choice("the image size of this config", size, SIZES)
    config = default_config(TrainConfig)
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
    config.init.weights = "pretrained_b16_in1k"
    config.classify.drop_path = 0.1
    config.data.path = "imagenet2012"
    config.data.examples = 1281167
    config.data.crop_scale = (0.08, 1.0)
    config.evals.heldout = "imagenet2012"
    config.evals.heldout_split = "validation"
    config.evals.every = "1 epochs"
    config.checkpoint.best = "val/top1_squash"
    return config
