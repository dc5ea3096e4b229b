"""Config changes that a run may resume with; full runs are in checkpointing_test."""

import json
from types import SimpleNamespace

import pytest

from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.config.schema import parse
from dgpt_jax.errors import UserError
from dgpt_jax.training import resume

IDENTITY = {"examples": 1, "views": ["a"]}


class Restored(Exception):
    """Raised instead of restoring the state."""


class FakeCheckpoints:
    """A run with one checkpoint, of which only the metadata are read."""

    directory = "RUN/checkpoints"

    def __init__(self, config: dict, init: dict | None = None):
        self.config, self.init = config, init

    def latest(self) -> int:
        return 3

    def metadata(self, step: int) -> dict:
        return {"config": self.config, "data": IDENTITY, "init": self.init}

    def restore(self, *_):
        raise Restored


def settings(**changes) -> TrainConfig:
    return parse(TrainConfig, {"data": {"path": "x"}} | changes)


def as_saved(config: TrainConfig) -> dict:
    return json.loads(json.dumps(schema.to_dict(config)))


def resume_log(config: TrainConfig, saved: dict, monkeypatch, *, allow: bool = False) -> list[str]:
    """Lines logged until the state is restored. Raises UserError."""
    monkeypatch.setattr(resume.train_step, "abstract_state", lambda *_: None)
    lines: list[str] = []
    examples = SimpleNamespace(data=config.data, identity=lambda: IDENTITY)
    task = SimpleNamespace(init=None, examples=examples, frozen_identity=None)
    with pytest.raises(Restored):
        resume.restore_or_init(
            config, task, None, None, FakeCheckpoints(saved), lines.append,
            allow_config_change=allow,
        )  # fmt: skip
    assert lines.pop() == "resuming from step 3 in RUN/checkpoints"
    return lines


def without(config: dict, name: str) -> dict:
    """The config as saved before the field was added."""
    *parents, last = name.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    return config


NEW_FIELDS = [
    "optim.loss_spike_factor",
    "data.max_bad_fraction",
    "seed",
    "checkpoint.best",
    "model.remat",
    "hosts",
]


@pytest.mark.parametrize("name", NEW_FIELDS)
def test_a_field_added_after_the_checkpoint_had_its_default(name, monkeypatch):
    saved = without(as_saved(settings()), name)
    assert resume_log(settings(), saved, monkeypatch) == []


def test_a_field_added_later_and_set_is_a_change(monkeypatch):
    saved = without(
        without(as_saved(settings()), "optim.loss_spike_factor"), "data.max_bad_fraction"
    )
    changed = settings(data={"path": "x", "max_bad_fraction": 0.5})
    (line,) = resume_log(changed, saved, monkeypatch)
    assert line.startswith("config.data.max_bad_fraction is 0.5") and line.endswith("0.001")
    changed = settings(optim={"loss_spike_factor": 3.0})
    with pytest.raises(UserError, match="optim.loss_spike_factor is 3.0.*--allow_config_change"):
        resume_log(changed, saved, monkeypatch)
    (line,) = resume_log(changed, saved, monkeypatch, allow=True)
    assert line.startswith("config.optim.loss_spike_factor is 3.0")


def test_a_removed_field_is_no_change(monkeypatch):
    saved = as_saved(settings()) | {"removed": 1}
    assert resume_log(settings(), saved, monkeypatch) == []


def test_fields_that_change_the_run_are_not_resumable():
    fields = schema.flatten(schema.to_dict(settings()))
    resumable = {name for name in fields if resume.RESUMABLE_FIELDS.match(name)}
    assert {"log_every", "accum_steps", "mesh.fsdp", "checkpoint.keep", "model.remat"} <= resumable
    assert not resumable & {"seed", "batch_size", "total", "dtype", "data.order", "optim.blr"}


@pytest.mark.parametrize(
    "saved,refused", [({"sha256": "a"}, False), ({"sha256": "b"}, True), (None, False)]
)
def test_a_frozen_encoder_must_be_that_of_the_start(monkeypatch, saved, refused):
    """None: a checkpoint from before identities were recorded."""
    monkeypatch.setattr(resume.train_step, "abstract_state", lambda *_: None)
    config = settings(init={"weights": "FILE"})
    examples = SimpleNamespace(data=config.data, identity=lambda: IDENTITY)
    identity = {"source": "FILE", "sha256": "a"}
    task = SimpleNamespace(init=None, examples=examples, frozen_identity=identity)
    checkpoints = FakeCheckpoints(as_saved(config), saved and saved | {"source": "OTHER"})
    error, message = (UserError, "FILE.*OTHER") if refused else (Restored, None)
    with pytest.raises(error, match=message):
        resume.restore_or_init(
            config, task, None, None, checkpoints, [].append, allow_config_change=True
        )
