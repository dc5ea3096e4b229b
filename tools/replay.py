"""Replays a step with non-finite numbers: DIR is a run's bad_step_… directory."""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands.replay import main

if __name__ == "__main__":
    cli.run(main)
