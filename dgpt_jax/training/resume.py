"""Where a run begins: at its newest checkpoint, if that is of the same run."""

import dataclasses
import json
import re

from dgpt_jax import class_names, optim, schema, state
from dgpt_jax.schema import UserError

# What may be another when a run is continued: it changes neither parameters nor data nor schedule.
# What data.path and data.views lead to is compared by itself.
FREE = re.compile(
    r"(log_every|profile|platform|wandb|accum_steps|(hosts|mesh|checkpoint|evals)\..*|model\.remat|"
    r"data\.(path|source|examples|views|threads|workers|prefetch_bytes|cache|bad_records|bad_most)|"
    r"teacher\.weights|"
    r"classify\.(weights|resize)|optim\.bad_steps)$"
)
# What can never be: the state has another form, or another meaning.
NEVER = re.compile(
    r"(task|model\..*|classify\.(num_classes|pooling|train|head)|optim\.(ema|kind|grid))$"
)


def begin(config, task, tx, mesh, checkpoints, progress, allow_config_change: bool):
    """(state, step) of the run's newest checkpoint, else fresh ones.

    Raises UserError where the checkpoint is of another model, or of other data or a config that
    differs in more than FREE, unless that is allowed. Says all differences.
    """
    latest = checkpoints.latest()
    if latest is None:
        return state.create(task.init, tx, mesh, config.seed, task.given), 0
    metadata = checkpoints.metadata(latest)
    # A field that is younger than the checkpoint had its default.
    before = schema.flatten(json.loads(json.dumps(schema.to_dict(type(config)()))))
    before |= schema.flatten(metadata["config"])
    now = schema.flatten(json.loads(json.dumps(schema.to_dict(config))))
    changes = {name: value for name, value in now.items() if value != before.get(name)}
    for name, value in changes.items():
        progress.say(
            f"config.{name} is {value!r}, in the checkpoint of step {latest} {before.get(name)!r}"
        )
    refused = [name for name in changes if not FREE.match(name)]
    if never := [name for name in refused if NEVER.match(name)]:
        raise UserError(
            f"config.{never[0]} is {now[never[0]]!r}, in the checkpoint of step {latest} "
            f"{before.get(never[0])!r}: choose another --workdir"
        )
    if refused and not allow_config_change:
        raise UserError(
            f"config.{refused[0]} is {now[refused[0]]!r}, in the checkpoint of step {latest} "
            f"{before.get(refused[0])!r}"
            + (f" (and {len(refused) - 1} more, above)" if refused[1:] else "")
            + ": this is another run. Choose another --workdir, or give --allow_config_change"
        )
    check_data(metadata.get("data"), task.examples, latest, progress, allow_config_change)
    progress.say(f"continuing from step {latest} in {checkpoints.directory}")
    restored = checkpoints.restore(latest, state.abstract(task.init, tx, mesh))
    return dataclasses.replace(restored, opt_state=optim.recount(restored.opt_state)), latest


def check_data(before: dict | None, examples, latest: int, progress, allowed: bool):
    """Raises UserError where the data are others than those of the checkpoint's run, unless that is
    allowed: then it says so. Checkpoints of earlier versions do not tell theirs (None)."""
    path = examples.data.path
    if before is None:
        progress.say(
            f"the checkpoint of step {latest} does not tell its data: {path} is taken for them"
        )
        return
    for change in data_changes(before, examples.identity()):
        if not allowed:
            raise UserError(
                f"{path} {change} in the checkpoint of step {latest}. Choose another --workdir, or "
                f"give --allow_config_change"
            )
        progress.say(f"{path} {change} in the checkpoint of step {latest}")


def data_changes(before: dict, now: dict) -> list[str]:
    """What differs between two pipeline.Examples.identity(), each as "has …, and had …"."""
    changes = []
    if before["examples"] != now["examples"]:
        changes.append(f"has {now['examples']} examples, and had {before['examples']}")
    elif (kept := len(before["views"])) < len(now["views"]) and (
        now["views"][:kept] == before["views"]
    ):
        changes.append(
            f"has {len(now['views'])} views (--config.data.views={kept} reads the same as before), "
            f"and had {kept}"
        )
    elif len(before["views"]) != len(now["views"]):
        changes.append(f"is read with {len(now['views'])} views, and was with {kept}")
    elif before["views"] != now["views"]:
        changes.append("has other contents than")
    if before.get("teacher") != now.get("teacher"):
        changes.append(
            f"has tokens of the teacher {now.get('teacher')}, and had those of "
            f"{before.get('teacher')}"
        )
    if before.get("classes") != now.get("classes"):
        names = (class_names.shown(x.get("classes") or []) for x in (now, before))
        changes.append("has {}, and had {}".format(*names))
    return changes
