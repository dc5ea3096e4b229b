"""Pretrains a tiny D-iGPT on 32×32 scenes on a laptop's CPU; part of tools/quickstart.sh.

    python -m dgpt_jax.train --config=configs/quickstart.py:both --workdir=DIR \\
        --config.data.path=TOKENS --config.evals.heldout=TOKENS_OF_TEST

The argument selects the losses: both, next, visible, or pixels (iGPT's target). 600 steps take 3
minutes of one core. Results: README.md, "Quickstart".
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

LOSSES = ("both", "next", "visible", "pixels")


def get_config(losses: str = "both"):
    check_choice("the losses of this config", losses, LOSSES)
    config = default_config(TrainConfig)
    config.total = "600 steps"
    config.batch_size = 64
    config.dtype = "float32"
    config.platform = "cpu"
    config.log_every = 10
    config.model.image_size = 32
    config.model.patch = 8
    config.model.width = 96
    config.model.depth = 6
    config.model.heads = 3
    config.model.decoder_width = 64
    config.model.decoder_heads = 2
    config.model.remat = "full"  # on CPU as fast as none (580 and 545 images/s)
    config.optim.blr = 6e-3  # × 64 / 256 = 1.5e-3
    config.optim.warmup = "10%"
    config.checkpoint.every = "50%"
    config.evals.every = "25%"
    config.evals.figures = 0
    config.data.threads = 2
    # Live views of the pixel run, drawn as the store's.
    config.data.crop_scale = (0.8, 1.0)
    config.data.flip = False
    if losses == "pixels":
        config.data.targets = "pixels"
    config.loss.next = 0.0 if losses == "visible" else 1.0
    config.loss.visible = 0.0 if losses in ("next", "pixels") else 1.0
    return config
