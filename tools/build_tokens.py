"""Builds a token store from a TFDS image dataset and the weights of a teacher."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.build_tokens import main

if __name__ == "__main__":
    cli.run(main)
