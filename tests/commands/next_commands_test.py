"""Batch sizes of suggested commands."""

import pytest

from dgpt_jax.commands import next_commands


@pytest.mark.parametrize(
    "examples,batch",
    [(1, 1), (10, 8), (16, 16), (63, 16), (180, 32), (1000, 128), (4095, 256), (4096, None)],
)
def test_few_examples_get_a_smaller_batch(examples, batch):
    command = next_commands.train("TOKENS", "RUN", examples)
    assert ("--config.batch_size" in command) == (batch is not None)
    assert batch is None or command.endswith(f"--config.batch_size={batch}")
    assert batch is None or batch <= examples
