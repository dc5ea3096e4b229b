"""Resuming: restores the newest checkpoint of a work directory if it is of the same run."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from dgpt_jax.config import TrainConfig, schema, smoke
from dgpt_jax.data import class_names
from dgpt_jax.data.dataset import ExampleDataset
from dgpt_jax.errors import UserError, counted
from dgpt_jax.training import optimizer, train_step
from dgpt_jax.training.checkpointing import Checkpoints
from dgpt_jax.training.initial_weights import InitialWeights
from dgpt_jax.training.tasks.base import Task

# Config fields that may differ when a run resumes: they change neither parameters nor data nor
# schedule. The data behind data.path and data.views are compared by `check_data`.
RESUMABLE_FIELDS = re.compile(
    r"(log_every|profile|platform|kernels|wandb|accum_steps|(hosts|mesh|checkpoint|evals)\..*|model\.remat|"
    r"data\.(path|source|examples|views|threads|workers|prefetch_bytes|cache|bad_records|max_bad_fraction)|"
    r"(teacher|teachers\.\w+)\.(weights|width|grid)|"
    r"init\.(weights|decoders)|classify\.resize|optim\.max_skipped_in_a_row)$"
)
# Fields that may never differ: the state would have other shapes or another meaning.
FIXED_FIELDS = re.compile(
    r"(task|model\..*|classify\.(num_classes|pooling|trainable|head)|"
    r"optim\.(ema|kind|base_lr_grid|layer_decay))$"
)


class Origin(NamedTuple):
    """What a run begins with: its checkpoint of step `latest`, else `weights` at step 0.

    identity: InitialWeights.identity of the weights at step 0. lines: to log.
    """

    latest: int | None
    weights: InitialWeights | None
    identity: Mapping[str, str] | None
    lines: tuple[str, ...]


class Start(NamedTuple):
    """State of a run after `step` steps, and InitialWeights.identity of its weights at step 0."""

    state: train_step.TrainState
    step: int
    init: Mapping[str, str] | None


def find_origin(
    config: TrainConfig,
    task: Task,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
    *,
    allow_config_change: bool,
) -> Origin:
    """The run's newest checkpoint, after a comparison with the config, else config.init.weights,
    which are read only here, else random parameters.

    Logs all differences of a checkpoint. Raises UserError if it is of another model, or if its
    data, or config fields other than RESUMABLE_FIELDS, differ and `allow_config_change` is False,
    and on weights that do not fit the config.
    """
    latest = checkpoints.latest()
    if latest is None:
        weights = task.initial_weights()
        return Origin(None, weights, weights.identity, weights.notes)
    metadata = checkpoints.metadata(latest)
    # Fields added after the checkpoint was written had their defaults.
    saved = schema.flatten(json.loads(json.dumps(schema.to_dict(type(config)()))))
    saved |= schema.flatten(metadata["config"])
    current = schema.flatten(json.loads(json.dumps(schema.to_dict(config))))
    if smoke.is_smoke(saved) and not smoke.is_smoke(current):
        raise UserError(
            f"{os.path.dirname(checkpoints.directory)} holds a run with --smoke: remove it, or "
            f"choose another --workdir"
        )
    changes = {
        name: f"config.{name} is {value!r}, in the checkpoint of step {latest} {saved.get(name)!r}"
        for name, value in current.items()
        if value != saved.get(name)
    }
    changed = [name for name in changes if not RESUMABLE_FIELDS.match(name)]
    fixed = [name for name in changed if FIXED_FIELDS.match(name)]
    refused = fixed or ([] if allow_config_change else changed)
    for name, change in changes.items():
        if name not in refused[:1]:  # which the error says
            say(change)
    if fixed:
        raise UserError(f"{changes[fixed[0]]}: choose another --workdir")
    if refused:
        more = f" (and {len(refused) - 1} more, above)" if refused[1:] else ""
        raise UserError(
            f"{changes[refused[0]]}{more}: choose another --workdir, or pass --allow_config_change "
            f"to resume with the changed config"
        )
    check_data(metadata.get("data"), task.examples, latest, say, allow_config_change)
    identity = metadata.get("init")
    _check_frozen(task.frozen_identity, identity, latest)
    unread = config.init.weights and not task.frozen_identity
    line = f"resuming from step {latest} in {checkpoints.directory}"
    line += ", config.init.weights is not read" if unread else ""
    return Origin(latest, None, identity, (line,))


def restore_or_init(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    seed: int,
    origin: Origin,
) -> Start:
    """The state that a run begins with."""
    if origin.weights is not None:
        state = train_step.init_state(task.init, tx, mesh, seed, origin.weights.params)
        return Start(state, 0, origin.identity)
    assert origin.latest is not None
    restored = checkpoints.restore(origin.latest, train_step.abstract_state(task.init, tx, mesh))
    opt_state = optimizer.reset_skip_counter(restored.opt_state)
    state = dataclasses.replace(restored, opt_state=opt_state)
    return Start(state, origin.latest, origin.identity)


def _check_frozen(
    current: Mapping[str, str] | None, saved: Mapping[str, str] | None, latest: int
) -> None:
    """Raises UserError if the weights of a frozen encoder are not those that training started with
    (None: of none, or in an old checkpoint)."""
    if current and saved and current["sha256"] != saved["sha256"]:
        raise UserError(
            f"{current['source']} (config.init.weights) is another encoder than that of the "
            f"checkpoint of step {latest}, {saved['source']}: choose another --workdir"
        )


def check_data(
    saved: Mapping[str, Any] | None,
    examples: ExampleDataset,
    latest: int,
    say: Callable[[str], None],
    allowed: bool,
):
    """Compares the data with those of the checkpoint of step `latest`. Raises UserError if they
    differ, or logs it if `allowed`. saved: ExampleDataset.identity, None in old checkpoints."""
    path = examples.data.path
    if saved is None:
        say(f"the checkpoint of step {latest} does not record its data, {path} is assumed")
        return
    for change in data_changes(saved, examples.identity()):
        message = f"{path} {change} in the checkpoint of step {latest}"
        if not allowed:
            raise UserError(f"{message}: choose another --workdir, or pass --allow_config_change")
        say(message)


def data_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences between two ExampleDataset.identity().

    Each begins with "has …" and ends with the saved value or "than", before the checkpoint's name.
    """
    changes, views, saved_views = [], current["views"], saved["views"]
    if saved["examples"] != current["examples"]:
        changes.append(f"has {counted(current['examples'], 'example')}, {saved['examples']}")
    elif len(views) != (count := len(saved_views)):
        hint = ""
        if views[:count] == saved_views:
            hint = f" (--config.data.views={count} selects the same)"
        changes.append(f"has {counted(len(views), 'view')}{hint}, {count}")
    elif views != saved_views:
        changes.append("has other contents than")
    if saved.get("teacher") != current.get("teacher"):
        changes.append(f"has tokens of teacher {current.get('teacher')}, {saved.get('teacher')}")
    if saved.get("classes") != current.get("classes"):
        names = (class_names.summary(x.get("classes") or []) for x in (current, saved))
        changes.append("has {}, {}".format(*names))
    return changes
