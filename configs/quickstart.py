"""A tiny D-iGPT on 32×32 digits, on a laptop's CPU: what tools/quickstart.sh trains.

    python -m dgpt_jax.train --config=configs/quickstart.py:both --workdir=DIR \\
        --config.data.path=TOKENS --config.evals.heldout=TOKENS_OF_TEST

The argument names the losses: both, next, visible, or pixels (iGPT's target). 600 steps take
less than 2 minutes on one core. Results: README.md, "Ten minutes on a laptop".
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

LOSSES = ("both", "next", "visible", "pixels")


def get_config(losses: str = "both"):
    one_of("the losses of this config", losses, LOSSES)
    config = default(Train)
    config.total = "600 steps"
    config.batch_size = 64
    config.dtype = "float32"
    config.platform = "cpu"
    config.log_every = 20
    config.model.image_size = 32
    config.model.patch = 8
    config.model.width = 96
    config.model.depth = 6
    config.model.heads = 3
    config.model.decoder_width = 64
    config.model.decoder_heads = 2
    config.model.remat = "full"  # as fast as none on CPU cores (580 and 545 images/s)
    config.optim.blr = 6e-3  # × 64 / 256 = 1.5e-3
    config.optim.warmup = "10%"
    config.checkpoint.every = "50%"
    config.evals.every = "20%"
    config.data.threads = 2
    # Live views, of the pixel run: like the store's.
    config.data.crop_scale = (0.5, 1.0)
    config.data.flip = False
    if losses == "pixels":
        config.data.targets = "pixels"
    config.loss.next = 0.0 if losses == "visible" else 1.0
    config.loss.visible = 0.0 if losses in ("next", "pixels") else 1.0
    return config
