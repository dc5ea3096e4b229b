"""What every run of tools/ablate.py begins from; a study changes a few of its fields.

    python tools/ablate.py views --out=DIR [--config=configs/study.py:tiny]

tiny: an encoder of 64 × 6 on 32×32 pictures, 300 steps, for a CPU. large: 384 × 12 on 64×64
pictures of glyphs, 6,000 steps, for a GPU; not run by us.

Paths are below the study's DIR, which tools/ablate.py fills. Results: RESULTS.md.
"""

from dgpt_jax.config import Train
from dgpt_jax.schema import default, one_of

SIZES = ("tiny", "large")


def get_config(size=SIZES[0]):
    one_of("the size of this config", size, SIZES)
    config = default(Train)
    config.data.path = "tokens"
    config.data.views = 4
    # Live views, of the online teacher and of pixels; the stores' are drawn alike.
    config.data.crop_scale = (0.5, 1.0)
    config.data.flip = False
    config.optim.warmup = "10%"
    config.checkpoint.every = "50%"
    config.checkpoint.keep = 1
    config.model.patch = 8
    if size == "large":
        config.platform = "gpu"
        config.total = "6000 steps"
        config.batch_size = 256
        config.log_every = 200
        config.model.image_size = 64
        config.model.width = 384
        config.model.depth = 12
        config.model.heads = 6
        config.model.decoder_width = 256
        config.model.decoder_heads = 8
        config.optim.blr = 1e-3
        return config
    config.platform = "cpu"
    config.total = "300 steps"
    config.batch_size = 64
    config.dtype = "float32"
    config.log_every = 50
    config.model.image_size = 32
    config.model.width = 64
    config.model.depth = 6
    config.model.heads = 2
    config.model.decoder_width = 64
    config.model.decoder_heads = 2
    config.optim.blr = 6e-3  # × 64 / 256 = 1.5e-3
    config.data.threads = 2
    return config
