"""Writes one HTML file about a run: tools/report.py RUN --out=FILE.html"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.report import main

if __name__ == "__main__":
    cli.run(main)
