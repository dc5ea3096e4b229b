"""Steps in flight, each of which holds its batch in device memory."""

import jax
import jax.numpy as jnp
import pytest

from dgpt_jax import train
from dgpt_jax.config import TrainConfig
from dgpt_jax.config.schema import parse
from tests.support.data import TINY, image_dataset


def slowly(x):
    """Zero, after about 50 ms."""
    square = jnp.full((200, 200), x)
    return 0 * jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), square).sum()


@pytest.mark.slow
def test_few_steps_are_in_flight(tmp_path, monkeypatch):
    ends, in_flight = [], []
    make_train_step = train.make_train_step

    def counting_step(loss, *args, **kwargs):
        def slow_loss(params, frozen, batch):
            value, losses = loss(params, frozen, batch)
            return value + slowly(batch["order"][0, 0] / 9.0), losses

        step = make_train_step(slow_loss, *args, **kwargs)

        def counting(*operands):
            state, metrics = step(*operands)
            ends.append(jnp.copy(state.step))
            in_flight.append(sum(not end.is_ready() for end in ends))
            return state, metrics

        return counting

    monkeypatch.setattr(train, "make_train_step", counting_step)
    settings = {
        "total": "20 steps", "batch_size": 4, "dtype": "float32", "log_every": 20, "model": TINY,
        "data": {"path": str(image_dataset(tmp_path)), "targets": "pixels", "threads": 2},
        "loss": {"visible": 0.0}, "optim": {"warmup": "1 steps"},
        "evals": {"every": "20 steps"}, "checkpoint": {"every": "20 steps"},
    }  # fmt: skip
    assert train.train(parse(TrainConfig, settings), tmp_path / "run") == 0
    assert len(in_flight) == 20
    assert max(in_flight) <= 3  # two, and one that has just finished
