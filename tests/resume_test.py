"""Which differences of the config a run may continue with; whole runs are in checkpoint_test."""

import json
from types import SimpleNamespace

import pytest

from dgpt_jax import resume, schema
from dgpt_jax.config import Train
from dgpt_jax.schema import UserError, parse

IDENTITY = {"examples": 1, "views": ["a"]}


class Continued(Exception):
    """It came to reading the state."""


class Stored:
    """The newest checkpoint of a run, of which only the config is read."""

    directory = "RUN/checkpoints"

    def __init__(self, config: dict):
        self.config = config

    def latest(self) -> int:
        return 3

    def metadata(self, step: int) -> dict:
        return {"config": self.config, "data": IDENTITY}

    def restore(self, *_):
        raise Continued


class Said(list):
    say = list.append


def settings(**changes) -> Train:
    return parse(Train, {"data": {"path": "x"}} | changes)


def written(config: Train) -> dict:
    return json.loads(json.dumps(schema.to_dict(config)))


def begin(config: Train, stored: dict, monkeypatch, *, allow: bool = False) -> Said:
    """What is said until the state is read. Raises UserError."""
    monkeypatch.setattr(resume.state, "abstract", lambda *_: None)
    said = Said()
    examples = SimpleNamespace(data=config.data, identity=lambda: IDENTITY)
    task = SimpleNamespace(init=None, examples=examples)
    with pytest.raises(Continued):
        resume.begin(config, task, None, None, Stored(stored), said, allow)
    assert said.pop() == "continuing from step 3 in RUN/checkpoints"
    return said


def without(config: dict, name: str) -> dict:
    """As code wrote it that did not know the field yet."""
    *parents, last = name.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    return config


YOUNGER = ["optim.spike", "data.bad_most", "seed", "checkpoint.best", "model.remat", "hosts"]


@pytest.mark.parametrize("name", YOUNGER)
def test_a_field_younger_than_the_checkpoint_had_its_default(name, monkeypatch):
    stored = without(written(settings()), name)
    assert begin(settings(), stored, monkeypatch) == []


def test_a_younger_field_that_is_set_counts_as_changed(monkeypatch):
    stored = without(without(written(settings()), "optim.spike"), "data.bad_most")
    changed = settings(data={"path": "x", "bad_most": 0.5})
    said = begin(changed, stored, monkeypatch)
    assert said == ["config.data.bad_most is 0.5, in the checkpoint of step 3 0.001"]
    changed = settings(optim={"spike": 3.0})
    with pytest.raises(UserError, match="optim.spike is 3.0, .* step 3 0.0: this is another"):
        begin(changed, stored, monkeypatch)
    said = begin(changed, stored, monkeypatch, allow=True)
    assert said == ["config.optim.spike is 3.0, in the checkpoint of step 3 0.0"]


def test_a_field_that_is_gone_is_no_difference(monkeypatch):
    stored = written(settings()) | {"gone": 1}
    assert begin(settings(), stored, monkeypatch) == []


def test_what_changes_the_run_is_not_free():
    fields = schema.flatten(schema.to_dict(settings()))
    free = {name for name in fields if resume.FREE.match(name)}
    assert {"log_every", "accum_steps", "mesh.fsdp", "checkpoint.keep", "model.remat"} <= free
    assert not free & {"seed", "batch_size", "total", "dtype", "data.order", "optim.blr"}
