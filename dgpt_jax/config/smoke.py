"""`--smoke`: turns any command into a one-minute dry run on a CPU, through the same code.

Data, teacher, image and patch size, segments, losses and optimizer stay as configured. Sizes and
durations are reduced, those of explicit flags too, and expected properties of the data are not
checked.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from dgpt_jax.config import schema as schema_lib
from dgpt_jax.config.roots import EvaluateConfig, TokensConfig, TrainConfig
from dgpt_jax.errors import UserError

HELP = "one-minute dry run on a CPU: your data, with a tiny model, few steps and small batches"
WIDTH = 32
# In the form of command-line flags.
OVERRIDES = {
    TrainConfig: (
        "total=4 steps", "log_every=1", "platform=cpu", "kernels=auto",
        f"model.width={WIDTH}", "model.depth=8", "model.heads=2", "model.taps=None",
        "model.decoder_width=32", "model.decoder_heads=2",
        "data.examples=None", "data.lanes=None", "teacher.width=None", "teacher.grid=None",
        "optim.warmup=2 steps",
        "mesh.data=-1", "mesh.fsdp=1", "mesh.tensor=1",
        "checkpoint.every=2 steps", "checkpoint.keep_every=", "evals.every=2 steps",
    ),
    TokensConfig: ("tensor=1", "platform=cpu", "kernels=auto"),
    EvaluateConfig: ("shots=0", "seeds=0", "platform=cpu", "kernels=auto"),
}  # fmt: skip
# Numbers that are reduced to these, smaller ones are kept.
LIMITS = {
    TrainConfig: {
        "batch_size": 16, "accum_steps": 2, "evals.max_examples": 32, "evals.batch_size": 16,
    },
    TokensConfig: {"views": 1, "batch_size": 4, "shard_size": 4},
    EvaluateConfig: {"max_examples": 32, "batch_size": 16},
}  # fmt: skip
NEIGHBORS = (10, 20)  # kNN among 32 examples
_BOUND = r"(-?[\d_.]+(%|shard)?)"
_PART = rf"[\w-]+(\[({_BOUND}?:{_BOUND}?|-?\d+shard)\])?"
SPLIT = re.compile(rf"{_PART}(\s*\+\s*{_PART})*")  # of TFDS


def shrink(config: Any, schema: type, explicit: Iterable[str] = ()) -> str:
    """Reduces the ConfigDict of a schema. Raises UserError if it starts from larger weights.

    explicit: keys ("model.width") that the user set by flags. Returns a line with those of them
    whose values changed, "" if there are none.
    """
    before = schema_lib.flatten(config.to_dict())
    for flag in OVERRIDES[schema]:
        key, _, value = flag.partition("=")
        schema_lib.override(config, schema, f"config.{key}", value)
    for key, limit in LIMITS[schema].items():
        value = min(limit if before[key] is None else before[key], limit)
        schema_lib.override(config, schema, f"config.{key}", str(value))
    if schema is TrainConfig:
        if config.profile is not None:
            schema_lib.override(config, schema, "config.profile", "1,3")  # of the 4 steps
        for name in config.teachers:
            for size in ("width", "grid"):
                schema_lib.override(config, schema, f"config.teachers.{name}.{size}", "None")
        config.classify.mixup_group_size = config.batch_size
        if config.batch_size % config.accum_steps:
            config.accum_steps = 1
        config.init.freeze_blocks = min(config.init.freeze_blocks, config.model.depth)
        _refuse_large(config)
    elif schema is TokensConfig:
        config.split = f"{_without_slice('split', config.split)}[:8]"
    else:  # so few examples of two splits could have different classes
        _without_slice("test", config.test)
        config.train = config.test = _without_slice("train", config.train)
        config.k = tuple(k for k in config.k if k <= max(NEIGHBORS)) or NEIGHBORS
    after = schema_lib.flatten(config.to_dict())
    changes = ", ".join(
        f"{key} {_shown(before[key])} -> {_shown(after[key])}"
        for key in dict.fromkeys(explicit)
        if before[key] != after[key]
    )
    return f"--smoke: {changes}" if changes else ""


def is_smoke(config: Mapping[str, Any]) -> bool:
    """True if a flat config ("model.width": …) of training is one that `shrink` made."""
    values = (flag.partition("=")[::2] for flag in OVERRIDES[TrainConfig])
    names = ("model.width", "optim.warmup", "checkpoint.every", "evals.every")
    return all(str(config.get(name)) == value for name, value in values if name in names)


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "unset" if value in (None, "") else str(value)


def _without_slice(key: str, split: str) -> str:
    """The split without its slice, which a small dataset may not have. Raises UserError if it
    cannot be read."""
    if not SPLIT.fullmatch(split):
        raise UserError(f"config.{key}={split} is no split: write NAME or NAME[FROM:TO]")
    return split.partition("[")[0]


def _refuse_large(config: Any) -> None:
    """Raises UserError if the initial weights are not of a tiny model."""
    if not (weights := config.init.weights):
        return
    try:
        run = json.loads((epath.Path(weights) / "config.json").read_text())
        fits = run["model"]["width"] == WIDTH
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(
            f"--smoke trains a tiny model, config.init.weights {weights} is not a run of one: "
            f"pretrain with --smoke and use that run, or leave config.init.weights empty"
        )
