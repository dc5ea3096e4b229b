"""`--smoke`: turns any command into a one-minute dry run on a CPU, through the same code.

Data, teacher, image and patch size, segments, losses and optimizer stay as configured. Sizes and
durations are reduced, after all other flags, and expected properties of the data are not checked.
"""

import json
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
        "total=4 steps", "batch_size=16", "log_every=1", "platform=cpu", "kernels=auto",
        f"model.width={WIDTH}", "model.depth=8", "model.heads=2", "model.taps=None",
        "model.decoder_width=32", "model.decoder_heads=2",
        "data.examples=None", "data.lanes=None", "teacher.width=None", "teacher.grid=None",
        "classify.mixup_group_size=16", "optim.warmup=2 steps",
        "mesh.data=-1", "mesh.fsdp=1", "mesh.tensor=1",
        "checkpoint.every=2 steps", "checkpoint.keep_every=",
        "evals.every=2 steps", "evals.max_examples=32", "evals.batch_size=16",
    ),
    TokensConfig: (
        "views=1", "batch_size=4", "shard_size=4", "tensor=1", "platform=cpu", "kernels=auto",
    ),
    EvaluateConfig: (
        "max_examples=32", "shots=0", "seeds=0", "k=10,20", "batch_size=16", "platform=cpu",
        "kernels=auto",
    ),
}  # fmt: skip


def shrink(config: Any, schema: type) -> None:
    """Reduces the ConfigDict of a schema. Raises UserError if it starts from larger weights."""
    for flag in OVERRIDES[schema]:
        key, _, value = flag.partition("=")
        schema_lib.override(config, schema, f"config.{key}", value)
    if schema is TrainConfig:
        config.accum_steps = min(config.accum_steps, 2)
        config.init.freeze_blocks = min(config.init.freeze_blocks, config.model.depth)
        _refuse_large(config)
    elif schema is TokensConfig:
        config.split = f"{_without_slice(config.split)}[:8]"
    else:  # so few examples of two splits could have different classes
        config.train = config.test = _without_slice(config.train)


def _without_slice(split: str) -> str:
    """The split without its slice, which a small dataset may not have."""
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
