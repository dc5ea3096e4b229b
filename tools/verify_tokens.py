"""Re-runs the teacher on stored images and compares its tokens with the stored ones."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.verify_tokens import main

if __name__ == "__main__":
    cli.run(main)
