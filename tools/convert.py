"""Converts weights between layouts and checks that the result computes the same."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.convert import main

if __name__ == "__main__":
    cli.run(main)
