"""Checks whether this machine can train, and suggests fixes."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.doctor import main

if __name__ == "__main__":
    cli.run(main)
