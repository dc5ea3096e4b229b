"""Config changes that a run may resume with; full runs are in checkpointing_test."""

import json
from types import SimpleNamespace

import ml_collections
import pytest

from dgpt_jax.config import TrainConfig, schema, smoke
from dgpt_jax.config.schema import parse
from dgpt_jax.errors import UserError
from dgpt_jax.training import resume

IDENTITY = {"examples": 1, "views": ["a"]}


class FakeCheckpoints:
    """A run with one checkpoint, of which only the metadata are read."""

    directory = "RUN/checkpoints"

    def __init__(self, config: dict, init: dict | None = None):
        self.config, self.init = config, init

    def latest(self) -> int:
        return 3

    def metadata(self, step: int) -> dict:
        return {"config": self.config, "data": IDENTITY, "init": self.init}


def settings(**changes) -> TrainConfig:
    return parse(TrainConfig, {"data": {"path": "x"}} | changes)


def as_saved(config: TrainConfig) -> dict:
    return json.loads(json.dumps(schema.to_dict(config)))


def resume_log(
    config: TrainConfig, saved: dict, *, allow: bool = False, lines: list[str] | None = None
) -> list[str]:
    """Lines logged by the comparison with a checkpoint. Raises UserError."""
    lines = [] if lines is None else lines
    examples = SimpleNamespace(data=config.data, identity=lambda: IDENTITY)
    task = SimpleNamespace(init=None, examples=examples, frozen_identity=None)
    origin = resume.find_origin(
        config, task, FakeCheckpoints(saved), lines.append, allow_config_change=allow
    )
    assert origin.latest == 3 and origin.lines == ("resuming from step 3 in RUN/checkpoints",)
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
def test_a_field_added_after_the_checkpoint_had_its_default(name):
    saved = without(as_saved(settings()), name)
    assert resume_log(settings(), saved) == []


def test_a_field_added_later_and_set_is_a_change():
    saved = without(
        without(as_saved(settings()), "optim.loss_spike_factor"), "data.max_bad_fraction"
    )
    changed = settings(data={"path": "x", "max_bad_fraction": 0.5})
    (line,) = resume_log(changed, saved)
    assert line.startswith("config.data.max_bad_fraction is 0.5") and line.endswith("0.001")
    changed = settings(optim={"loss_spike_factor": 3.0})
    with pytest.raises(UserError, match="optim.loss_spike_factor is 3.0.*--allow_config_change"):
        resume_log(changed, saved)
    (line,) = resume_log(changed, saved, allow=True)
    assert line.startswith("config.optim.loss_spike_factor is 3.0")


@pytest.mark.parametrize(
    "changes,logged,error",
    [
        ({"seed": 1}, [], "config.seed is 1.* 0: choose"),
        ({"seed": 1, "log_every": 9}, ["log_every"], "config.seed is 1.* 0: choose"),
        ({"seed": 1, "batch_size": 9}, ["batch_size"], r"config.seed .*\(and 1 more, above\)"),
        ({"seed": 1, "task": "classify"}, ["seed"], "config.task is .*choose another --workdir$"),
    ],
)
def test_each_difference_is_said_once(changes, logged, error):
    lines: list[str] = []
    with pytest.raises(UserError, match=error):
        resume_log(settings(**changes), as_saved(settings()), lines=lines)
    assert [line.split()[0] for line in lines] == [f"config.{name}" for name in logged]


def test_a_smoke_run_in_the_work_directory():
    """The error says so, rather than which values differ."""
    config = ml_collections.ConfigDict(schema.to_dict(settings()))
    smoke.shrink(config, TrainConfig)
    small = parse(TrainConfig, config)
    assert resume_log(small, as_saved(small)) == []
    lines: list[str] = []
    with pytest.raises(UserError, match="RUN holds a run with --smoke: remove it, or choose"):
        resume_log(settings(), as_saved(small), lines=lines, allow=True)
    assert lines == []
    tiny = settings(model={"width": smoke.WIDTH, "heads": 2})  # not made by --smoke
    with pytest.raises(UserError, match="config.model.width is 768"):
        resume_log(settings(), as_saved(tiny))


def test_a_removed_field_is_no_change():
    saved = as_saved(settings()) | {"removed": 1}
    assert resume_log(settings(), saved) == []


def test_fields_that_change_the_run_are_not_resumable():
    fields = schema.flatten(schema.to_dict(settings()))
    resumable = {name for name in fields if resume.RESUMABLE_FIELDS.match(name)}
    assert {"log_every", "accum_steps", "mesh.fsdp", "checkpoint.keep", "model.remat"} <= resumable
    assert not resumable & {"seed", "batch_size", "total", "dtype", "data.order", "optim.blr"}


@pytest.mark.parametrize(
    "saved,refused", [({"sha256": "a"}, False), ({"sha256": "b"}, True), (None, False)]
)
def test_a_frozen_encoder_must_be_that_of_the_start(saved, refused):
    """None: a checkpoint from before identities were recorded."""
    config = settings(init={"weights": "FILE"})
    examples = SimpleNamespace(data=config.data, identity=lambda: IDENTITY)
    identity = {"source": "FILE", "sha256": "a"}
    task = SimpleNamespace(init=None, examples=examples, frozen_identity=identity)
    checkpoints = FakeCheckpoints(as_saved(config), saved and saved | {"source": "OTHER"})

    def find():
        return resume.find_origin(config, task, checkpoints, [].append, allow_config_change=True)

    if refused:
        with pytest.raises(UserError, match="FILE.*OTHER"):
            find()
    else:
        assert find().latest == 3
