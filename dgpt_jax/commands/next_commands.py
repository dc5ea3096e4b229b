"""Commands that several others suggest in their last line, `next: …`."""

import shlex
from typing import Any

from dgpt_jax import invocation
from dgpt_jax.storage.gcs import AnyPath


def train(store: AnyPath, workdir: AnyPath = "RUN") -> str:
    """Returns the command that pretrains a B/16 on a token store of any images and teacher."""
    flags = (
        "--config=pretrain_b16_in1k", f"--workdir={workdir}",
        f"--config.data.path={store}", "--config.data.examples=None",
        "--config.teacher.width=None", "--config.teacher.grid=None",
    )  # fmt: skip
    return f"{invocation.command('train')} {shlex.join(flags)}"


def verify_tokens(store: AnyPath, teacher: Any) -> str:
    """Returns the command that verifies a token store built with a TeacherConfig."""
    names = ("weights", "heads", "activation", "image_size")
    values = {name: getattr(teacher, name) for name in names}
    flags = [f"--{name}={value}" for name, value in values.items() if value]
    return f"{invocation.command('verify')} {shlex.join([str(store), *flags])}"
