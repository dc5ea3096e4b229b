"""Checks of the sections that pretraining depends on."""

import dataclasses
from typing import TYPE_CHECKING

from dgpt_jax.config.data import FIRST
from dgpt_jax.errors import UserError

if TYPE_CHECKING:
    from dgpt_jax.config.roots import TrainConfig


def check_pretraining(config: "TrainConfig") -> None:
    """Raises UserError if values of a config with task=pretrain do not fit together."""
    optim = config.optim
    if optim.kind != "adamw" or optim.base_lr_grid:
        raise UserError("config.optim.kind and base_lr_grid need config.task=classify")
    if config.init.freeze_positions and config.model.positions != "learned":
        raise UserError("config.init.freeze_positions needs config.model.positions=learned")
    weights = dataclasses.asdict(config.loss)
    if not any(weights.values()):
        raise UserError(f"config.loss needs a positive weight, got {weights}")
    for name in ("visible", "distill"):
        if config.data.targets == "pixels" and weights[name]:
            raise UserError(
                f"config.data.targets=pixels supports loss.next only: set loss.{name} to 0"
            )
    if config.loss.distill and config.model.taps[-1] != config.model.depth:
        raise UserError(
            f"config.loss.distill uses the last block: config.model.taps must end with "
            f"{config.model.depth} (depth), got {config.model.taps}"
        )
    if config.model.segments == (1, 1) and config.loss.next:
        raise UserError("config.model.segments (1, 1) has no next segment: set loss.next to 0")
    _check_teachers(config)
    if config.data.targets == "online" and not config.teacher.weights:
        raise UserError("config.data.targets=online needs config.teacher.weights")


def _check_teachers(config: "TrainConfig") -> None:
    """Raises UserError if config.teachers and the weights of teachers do not fit together."""
    if config.teachers and config.data.targets != "stored":
        raise UserError(
            f"config.teachers needs config.data.targets=stored, got {config.data.targets}"
        )
    if FIRST in config.teachers:
        raise UserError(f"config.teachers.{FIRST}: that is the name of config.teacher")
    weights = [config.teacher, *config.teachers.values()]
    if config.data.targets != "stored" and config.teacher.normalize != "none":
        raise UserError(
            f"config.teacher.normalize={config.teacher.normalize} needs config.data.targets=stored"
        )
    if not any(teacher.loss_weight for teacher in weights):
        raise UserError("all teachers have loss_weight 0: set config.teacher.loss_weight above 0")
    if config.model.separate_decoders and not config.teachers:
        raise UserError("config.model.separate_decoders needs config.teachers")
