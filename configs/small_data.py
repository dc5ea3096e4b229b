"""Small data: pretraining on about 10,000 images with one GPU, and its toy form for a CPU.

    python -m dgpt_jax.train --config=configs/small_data.py:s16 --workdir=DIR \\
        --config.data.path=TOKENS_90 --config.evals.heldout=TOKENS_10

s16: ViT-S/16 from scratch, 500 epochs of 9,000 images, batch 256, peak learning rate 6e-4. b16:
ViT-B/16 from published weights (config.init.weights), 100 epochs. Not run by us: they need images
and a teacher. Which to choose, and commands for the stores: docs/tutorials/small_data.md.

Figures of `tools/plan.py --device=gpu` for one H100 or H200 (FLOPs and data sheets, not run), with
9,000 images:

    form    steps   GFLOP per image   images/s, at most   minutes, at least   at 45 % MFU
    s16    17,578              89.6              11,037                 6.8          15.1
    b16     3,515             153.3               6,451                 2.3           5.2

Measured on one H200 (docs/results/gpu.md): S/16 with a batch of 512, 3,910 images/s and 35.2 GB;
B/16 with 256, 2,475 images/s and 26.1 GB. At these rates s16 takes 19 minutes, b16 6.

cpu: a toy of s16 on 32×32 scenes (dgpt_jax/examples/scenes.py), 30 epochs of 5,748 images, batch
64. On one core of a shared CPU 15 minutes (671 s of CPU; 830 s with images, teacher and stores),
1.2 GB; kNN 81 %, one seed. The measured curve: docs/results/small_data.md.

Learning rate of s16: the paper's 2.4e-3 at batch 4096, scaled by the square root of the batch, as
DINOv2 scales its own: 2.4e-3 × (256 / 4096)^½ = 6e-4. The linear rule gives 1.5e-4.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

SIZES = ("s16", "b16", "cpu")


def get_config(form: str = SIZES[0]):
    check_choice("the form of this config", form, SIZES)
    config = default_config(TrainConfig)
    config.data.path = "tokens_90"
    config.batch_size = 256
    config.optim.warmup = "10%"
    config.checkpoint.every = "10%"
    config.evals.every = "4%"
    if form == "cpu":
        return cpu(config)
    config.data.examples = 9000  # of the plan; set None or your own number
    config.teacher.width = 1024  # OpenCLIP ViT-H/14
    config.teacher.grid = 16
    config.model.decoder_width = 1024
    if form == "s16":
        config.model.size = "S/16"
        config.total = "500 epochs"
        config.optim.blr = 6e-4  # × 256 / 256
        return config
    config.model.size = "B/16"
    config.model.positions = "learned"  # as those of timm, Hugging Face and DINOv2
    config.init.weights = "weights"
    config.init.freeze_blocks = 12  # until the fresh decoders predict something
    config.init.freeze_steps = "5 epochs"
    config.total = "100 epochs"
    config.optim.blr = 3e-4
    config.optim.layer_decay = 0.75
    return config


def cpu(config):
    """The toy form: the model of configs/quickstart.py."""
    config.platform = "cpu"
    config.dtype = "float32"
    config.total = "30 epochs"
    config.batch_size = 64
    config.log_every = 20
    config.model.image_size = 32
    config.model.patch = 8
    config.model.width = 96
    config.model.depth = 6
    config.model.heads = 3
    config.model.decoder_width = 64
    config.model.decoder_heads = 2
    config.model.remat = "full"
    config.optim.blr = 6e-3  # × 64 / 256 = 1.5e-3
    config.evals.label_free = 720
    config.evals.figures = 0
    config.data.threads = 2
    return config
