"""Runs the full pipeline on small images: python tools/quickstart.py [--out=DIR]"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.quickstart import main

if __name__ == "__main__":
    cli.run(main)
