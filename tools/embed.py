"""Writes an encoder's features of all images of a source."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.embed import main

if __name__ == "__main__":
    cli.run(main)
