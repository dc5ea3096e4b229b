"""Imports a collection of images as a TFDS image dataset; labels are optional."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.import_images import main

if __name__ == "__main__":
    cli.run(main)
