"""Where a run can be watched: TensorBoard, always; Weights & Biases where `config.wandb` asks."""

import contextlib
import secrets
import sys
from pathlib import Path
from typing import Protocol

import numpy as np

from dgpt_jax.schema import UserError

WANDB_ID = "wandb_id"  # a file of the work directory


class Board(Protocol):
    """What is told of a run, by step."""

    def scalars(self, step: int, values: dict[str, float]): ...

    def picture(self, step: int, name: str, picture: np.ndarray): ...

    def config(self, resolved: dict, text: str): ...

    def close(self): ...


class TensorBoard:
    """Event files in a directory, written by a thread of tensorboardX."""

    def __init__(self, directory: Path):
        self._writer = _summary_writer(directory)

    def scalars(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray):
        """uint8 (height, width, 3)."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def config(self, resolved: dict, text: str):
        self._writer.add_text("config", f"```\n{text}\n```")

    def close(self):
        with contextlib.suppress(OSError):  # a full disk: told by then, and only a copy
            self._writer.close()


class Wandb:
    """A run of a project in Weights & Biases (extra `wandb`), kept in a directory.

    A command that continues a work directory continues its run there. The step is a value like
    others, because W&B drops what is logged of steps before its last.
    """

    def __init__(self, project: str, name: str, directory: Path):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "config.wandb needs the package wandb: pip install 'dgpt_jax[wandb]', or leave it "
                "empty"
            ) from None
        self._wandb = wandb
        kept = directory / WANDB_ID
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project, name=name, dir=str(directory), id=kept.read_text().strip(),
                resume="allow",
            )  # fmt: skip
        except Exception as e:  # no key, no network, no such project
            reason = " ".join(str(e).split())[:300]
            raise UserError(
                f"config.wandb={project}: {reason} (WANDB_MODE=offline keeps the run on disk)"
            ) from e
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]):
        self._run.log({"step": step} | values)

    def picture(self, step: int, name: str, picture: np.ndarray):
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def config(self, resolved: dict, text: str):
        self._run.config.update(resolved, allow_val_change=True)

    def close(self):
        self._run.finish()


def _summary_writer(directory: Path):
    """tensorboardX's SummaryWriter. Imported here, and with torch hidden: where that is installed
    it would be imported too, which takes longer than all else together and serves nothing here."""
    torch = sys.modules.get("torch")
    sys.modules["torch"] = None
    try:
        import tensorboardX
    finally:
        del sys.modules["torch"]
        if torch is not None:
            sys.modules["torch"] = torch
    return tensorboardX.SummaryWriter(str(directory))
