"""Plots curves of runs: python tools/plot.py RUN… --out=FILE.png (or .svg)"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.plot import main

if __name__ == "__main__":
    cli.run(main)
