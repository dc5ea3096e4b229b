"""Compares token codecs and image encodings: bytes of a view, and what is lost."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.compare_codecs import main

if __name__ == "__main__":
    cli.run(main)
