"""Tabulates results beside published numbers: python tools/results.py RESULTS.json…"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.results import main

if __name__ == "__main__":
    cli.run(main)
