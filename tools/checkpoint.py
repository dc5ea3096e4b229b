"""Inspects, extracts and averages checkpoints, on the CPU."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.checkpoint import main

if __name__ == "__main__":
    cli.run(main)
