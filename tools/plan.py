"""Estimates memory, speed and cost of a config on TPUs, without TPUs."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.plan import main

if __name__ == "__main__":
    cli.run(main)
