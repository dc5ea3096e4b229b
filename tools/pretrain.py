"""Pretrains on a folder of images: python tools/pretrain.py FOLDER --teacher=CLIP --out=RUN"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.pretrain import main

if __name__ == "__main__":
    cli.run(main)
