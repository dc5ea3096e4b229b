"""Resuming: restores the newest checkpoint of a work directory if it is of the same run."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.data import class_names
from dgpt_jax.data.dataset import ExampleDataset
from dgpt_jax.errors import UserError, counted
from dgpt_jax.training import optimizer, train_step
from dgpt_jax.training.checkpointing import Checkpoints
from dgpt_jax.training.tasks.base import Task

# Config fields that may differ when a run resumes: they change neither parameters nor data nor
# schedule. The data behind data.path and data.views are compared by `check_data`.
RESUMABLE_FIELDS = re.compile(
    r"(log_every|profile|platform|kernels|wandb|accum_steps|(hosts|mesh|checkpoint|evals)\..*|model\.remat|"
    r"data\.(path|source|examples|views|threads|workers|prefetch_bytes|cache|bad_records|max_bad_fraction)|"
    r"teacher\.weights|"
    r"init\.weights|classify\.resize|optim\.max_skipped_in_a_row)$"
)
# Fields that may never differ: the state would have other shapes or another meaning.
FIXED_FIELDS = re.compile(
    r"(task|model\..*|classify\.(num_classes|pooling|trainable|head)|optim\.(ema|kind|base_lr_grid))$"
)


def check(
    config: TrainConfig,
    examples: ExampleDataset,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
    *,
    allow_config_change: bool,
) -> int | None:
    """Compares a run with its newest checkpoint; returns that one's step, None if there is none.

    Logs all differences. Raises UserError if the checkpoint is of another model, or if its data, or
    config fields other than RESUMABLE_FIELDS, differ and `allow_config_change` is False.
    """
    latest = checkpoints.latest()
    if latest is None:
        return None
    metadata = checkpoints.metadata(latest)
    # Fields added after the checkpoint was written had their defaults.
    saved = schema.flatten(json.loads(json.dumps(schema.to_dict(type(config)()))))
    saved |= schema.flatten(metadata["config"])
    current = schema.flatten(json.loads(json.dumps(schema.to_dict(config))))
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
    check_data(metadata.get("data"), examples, latest, say, allow_config_change)
    return latest


def restore_or_init(
    config: TrainConfig,
    task: Task,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    latest: int | None,
) -> train_step.TrainState:
    """The state of the checkpoint of step `latest`, the initial state if that is None."""
    if latest is None:
        return train_step.init_state(task.init, tx, mesh, config.seed, task.initial_params)
    restored = checkpoints.restore(latest, train_step.abstract_state(task.init, tx, mesh))
    return dataclasses.replace(restored, opt_state=optimizer.reset_skip_counter(restored.opt_state))


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
