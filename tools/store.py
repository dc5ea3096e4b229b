"""Describes, extracts, merges and splits token stores."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.store import main

if __name__ == "__main__":
    cli.run(main)
