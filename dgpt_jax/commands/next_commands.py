"""Commands that several others suggest in their last line, `next: …`."""

import shlex
from typing import Any

from dgpt_jax import invocation
from dgpt_jax.data import token_store
from dgpt_jax.planning import training_choice
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.storage.gcs import AnyPath

CONFIG_BATCH = 4096  # of the suggested config


def train(store: AnyPath, workdir: AnyPath = "RUN", examples: int = CONFIG_BATCH) -> str:
    """Returns the command that pretrains a B/16 on a token store of any images and teacher.

    examples: of the store; with fewer than the config's batch, a smaller batch is suggested.
    """
    flags = [
        "--config=pretrain_b16_in1k", f"--workdir={workdir}",
        f"--config.data.path={store}", "--config.data.examples=None",
        "--config.teacher.width=None", "--config.teacher.grid=None",
    ]  # fmt: skip
    if examples < CONFIG_BATCH:
        flags.append(f"--config.batch_size={training_choice.small_batch(examples)}")
    return f"{invocation.command('train')} {shlex.join(flags)}"


def store_examples(store: AnyPath) -> int:
    """Returns the number of examples in a view of a token store. Raises UserError."""
    return len(tfds_dataset.Split(store, token_store.view_split(0)))


def verify_tokens(store: AnyPath, teacher: Any, further: str | None = None) -> str:
    """Returns the command that verifies a token store built with a TeacherConfig, or the tokens of
    a further teacher."""
    names = ("weights", "heads", "activation", "image_size")
    values = {name: getattr(teacher, name) for name in names}
    flags = [f"--{name}={value}" for name, value in values.items() if value]
    flags += [f"--teacher={further}"] if further else []
    return f"{invocation.command('verify')} {shlex.join([str(store), *flags])}"
