"""Durations convert to steps exactly, and schedules of impossible durations are refused."""

import re

import pytest

from dgpt_jax.config import TrainConfig, durations, schema
from dgpt_jax.errors import UserError
from dgpt_jax.train import resolve_schedule


def steps(text, total=None, batch_size=100, examples=1050, least=0):
    return durations.steps(
        text, "config.x", batch_size=batch_size, examples=examples, total=total, least=least
    )


@pytest.mark.parametrize(
    "text,numbers,count",
    [
        ("300 epochs", {}, 3150),
        ("1 epoch", {}, 10),
        ("5000 steps", {}, 5000),
        ("1e6 examples", {}, 10_000),
        ("2%", {"total": 400}, 8),
        ("0.1 steps", {}, 0),
        ("0 steps", {}, 0),
        ("0e99 steps", {}, 0),
    ],
)
def test_units(text, numbers, count):
    assert steps(text, **numbers) == count


def test_percentages_and_epochs_are_exact():
    """Floats lose steps: 29 · (100 / 100) is 29, but int(100 * (29 / 100)) is 28."""
    for total in range(1, 2000):
        assert steps("100%", total=total) == total
        assert steps("10%", total=total) == total // 10
        assert steps("0.7%", total=total) == total * 7 // 1000
    for examples in range(1, 500):
        assert steps("100 epochs", batch_size=100, examples=examples) == examples
        assert steps("0.3 epochs", batch_size=7, examples=examples) == 3 * examples // 70


@pytest.mark.parametrize(
    "text",
    ["", "5", "epochs", "-1 steps", "3 weeks", "5%", "x%", "inf steps", "nan epochs",
     "1e999999999999 steps", "1e-999999999 steps", "1e15 steps", "1/2 epochs"],
)  # fmt: skip
def test_invalid_durations(text):
    with pytest.raises(UserError, match="config.x: .*duration"):
        steps(text)


def schedule(examples=320, **changes):
    base = {"data": {"path": "x"}, "batch_size": 32, "total": "10 epochs"}
    base |= {"optim": {"warmup": "1 epochs"}, "checkpoint": {"every": "50%"}}
    return resolve_schedule(schema.parse(TrainConfig, base | changes), examples)


def test_a_valid_schedule():
    plan = schedule(checkpoint={"every": "50%", "keep_every": "100%"}, evals={"every": "1 steps"})
    assert (plan.total, plan.warmup, plan.eval_every) == (100, 10, 1)
    assert (plan.checkpoint_every, plan.keep_every) == (50, 100)
    assert schedule(optim={"warmup": "99 steps"}).warmup == 99
    assert schedule(checkpoint={"every": "0.1%"}).checkpoint_every == 1
    assert schedule(total="1 steps", optim={"warmup": "10%"}, evals={"every": "1 steps"},
                    checkpoint={"every": "100%"}).warmup == 0  # fmt: skip


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"total": "0 epochs"}, "config.total='0 epochs' is 0 steps"),
        ({"total": "0.5 steps"}, "config.total='0.5 steps' is 0.5 steps"),
        ({"total": "31 examples"}, "config.total='31 examples' is 0.969 steps"),
        ({"total": "0 epochs", "examples": 15}, "set it to '1 steps' or more"),
        (
            {"total": "2 epochs", "examples": 15},
            "config.batch_size=32 exceeds the 15 examples, so that config.total='2 epochs' is 0.938"
            " steps: set --config.batch_size to at most 15",
        ),
        ({"optim": {"warmup": "100%"}}, "config.optim.warmup='100%' is not shorter than"),
        ({"optim": {"warmup": "10 epochs"}}, "is not shorter than config.total='10 epochs'"),
        (
            {"total": "64 examples", "optim": {"warmup": "2 steps"}},
            "config.optim.warmup='2 steps' is not shorter than config.total='64 examples'",
        ),
        (  # only the length of the dataset tells
            {"optim": {"warmup": "400 steps"}},
            "config.optim.warmup='400 steps' is 400 steps, config.total is 100",
        ),
        ({"checkpoint": {"every": "0 steps"}}, "config.checkpoint.every='0 steps' is 0 steps"),
        ({"checkpoint": {"every": "0%"}}, "config.checkpoint.every='0%' is 0 steps"),
        ({"checkpoint": {"keep_every": "0.01 epochs"}}, "config.checkpoint.keep_every='0.01"),
        ({"evals": {"every": "0.09 epochs"}}, "config.evals.every='0.09 epochs' is 0.9 steps"),
        ({"profile": (100, 105)}, "config.profile"),
    ],
)
def test_schedules_without_effect_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        schedule(**changes)
