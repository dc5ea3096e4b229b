"""Experiment trackers: TensorBoard, always; Weights & Biases if `config.wandb` is set."""

import contextlib
import secrets
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dgpt_jax.errors import UserError

WANDB_ID = "wandb_id"  # a file of the work directory


class Tracker(Protocol):
    """Interface of an experiment tracker."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def config(self, resolved: dict[str, Any], text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a directory, written by a thread of tensorboardX."""

    def __init__(self, directory: Path):
        self._writer = import_tensorboardx().SummaryWriter(str(directory))

    def scalars(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray):
        """image: uint8 (height, width, 3)."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def config(self, resolved: dict[str, Any], text: str):
        self._writer.add_text("config", f"```\n{text}\n```")

    def close(self):
        with contextlib.suppress(OSError):  # a full disk, reported when metrics.jsonl was written
            self._writer.close()


def import_wandb() -> Any:
    """Returns the module wandb. Raises UserError if it is missing."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise UserError(
            "config.wandb needs the package wandb: pip install 'dgpt_jax[wandb]', or "
            "--config.wandb=''"
        ) from None
    return wandb


class Wandb:
    """A run of a Weights & Biases project (extra `wandb`), with its files in `directory`.

    Resuming in a work directory resumes its W&B run. The step is logged as a value, because W&B
    drops values of steps before its last one. Raises UserError if wandb is missing or its init
    fails.
    """

    def __init__(self, project: str, name: str, directory: Path):
        self._wandb = wandb = import_wandb()
        id_file = directory / WANDB_ID
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project, name=name, dir=str(directory), id=id_file.read_text().strip(),
                resume="allow",
            )  # fmt: skip
        except Exception as e:  # no API key, no network, no such project
            reason = " ".join(str(e).split())[:300]
            raise UserError(
                f"config.wandb={project}: {reason} (WANDB_MODE=offline writes to disk only)"
            ) from e
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]):
        self._run.log({"step": step} | values)

    def image(self, step: int, name: str, image: np.ndarray):
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def config(self, resolved: dict[str, Any], text: str):
        self._run.config.update(resolved, allow_val_change=True)

    def close(self):
        self._run.finish()


def import_tensorboardx() -> Any:
    """Returns the module tensorboardX, imported without torch.

    Its writer module imports torch if that is installed, for add_graph and a type check, and every
    submodule goes through it: 3.5 s and 224 MB instead of 0.6 s and 43 MB (torch 2.x for CPU).
    There is no switch, and torch's CUDA libraries do not belong in a training process.
    """
    if "torch" in sys.modules:
        import tensorboardX
    else:
        # None makes `import torch` raise ImportError.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
        try:
            import tensorboardX
        finally:
            del sys.modules["torch"]
    return tensorboardX
