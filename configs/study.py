"""Base config of all runs of tools/studies/ablate.py; a study changes a few fields.

    python -m tools.studies.ablate views --out=DIR [--config=configs/study.py:tiny]

tiny: an encoder of width 64 and depth 6 on 32×32 images, 300 steps, for a CPU. large: width 384 and
depth 12 on 64×64 images of glyphs, 6,000 steps, for a GPU; not run by us.

Paths are relative to DIR, which tools/studies/ablate.py fills. Results:
docs/results/ablations.md.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

SIZES = ("tiny", "large")


def get_config(size: str = SIZES[0]):
    check_choice("the size of this config", size, SIZES)
    config = default_config(TrainConfig)
    config.data.path = "tokens"
    config.data.views = 4
    # Live views of the online teacher and of pixels, drawn as the stores'.
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
