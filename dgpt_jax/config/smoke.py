"""`--smoke`: any config as a rehearsal of a minute on a CPU, through the same code.

Data, teacher, image and patch size, segments, losses and recipe stay the user's. What is large is
made small, after all other flags, and what the config expects of its data is not asked for.
"""

import json

from etils import epath

from dgpt_jax import schema as schema_lib
from dgpt_jax.config import Evaluate, Tokens, Train
from dgpt_jax.schema import UserError

HELP = "rehearse on a CPU: a tiny model, a few steps, small batches, few examples; data stay yours"
WIDTH = 32
# As a user would type them.
OVERRIDES = {
    Train: (
        "total=4 steps", "batch_size=16", "log_every=1", "platform=cpu",
        f"model.width={WIDTH}", "model.depth=8", "model.heads=2", "model.taps=None",
        "model.decoder_width=32", "model.decoder_heads=2",
        "data.examples=None", "data.lanes=None", "teacher.width=None", "teacher.grid=None",
        "classify.mix_group=16", "optim.warmup=2 steps",
        "mesh.data=-1", "mesh.fsdp=1", "mesh.tensor=1",
        "checkpoint.every=2 steps", "checkpoint.keep_every=",
        "evals.every=2 steps", "evals.most=32", "evals.batch_size=16",
    ),
    Tokens: ("views=1", "batch_size=4", "shard_size=4", "tensor=1", "platform=cpu"),
    Evaluate: ("most=32", "shots=0", "seeds=0", "k=10,20", "batch_size=16", "platform=cpu"),
}  # fmt: skip


def shrink(config, schema):
    """Makes a ConfigDict of a schema small. Raises UserError where it would not be the same."""
    for text in OVERRIDES[schema]:
        key, _, value = text.partition("=")
        schema_lib.override(config, schema, f"config.{key}", value)
    if schema is Train:
        config.accum_steps = min(config.accum_steps, 2)
        _refuse_large(config)
    elif schema is Tokens:
        config.split = f"{_whole(config.split)}[:8]"
    else:  # of another split so few examples could have other classes
        config.train = config.test = _whole(config.train)


def _whole(split: str) -> str:
    """Without its slice, which a small dataset may not have."""
    return split.partition("[")[0]


def _refuse_large(config):
    """Raises UserError where the model starts from weights that a tiny one cannot take."""
    weights = config.classify.weights if config.task == "classify" else ""
    if not weights:
        return
    try:
        told = json.loads((epath.Path(weights) / "config.json").read_text())
        fits = told["model"]["width"] == WIDTH
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(
            f"--smoke trains a tiny model, and {weights} is not the run of one: pretrain with "
            f"--smoke and name that run, or leave config.classify.weights empty"
        )
