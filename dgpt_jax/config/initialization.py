"""Config of the initial parameters, and checks of the sections that it depends on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgpt_jax.config.ranges import NATURAL
from dgpt_jax.config.schema import check_choice, field
from dgpt_jax.errors import UserError

if TYPE_CHECKING:
    from dgpt_jax.config.roots import TrainConfig


@dataclass(frozen=True)
class InitConfig:
    """Section `init`."""

    weights: str = field(
        "",
        "work directory, or weights in any layout that can be read (hf:ORG/NAME: on the Hugging "
        "Face hub), to start from; empty: random parameters. A run that resumes does not read it, "
        "except for the encoder of a probe",
        path=True,
    )
    decoders: str = field(
        "auto",
        "task=pretrain: auto (those of init.weights if it has any) or fresh (random parameters)",
    )
    freeze_blocks: int = field(
        0,
        "first encoder blocks that, with patch embedding, CLS and positions, are not updated for "
        "freeze_steps; 0: none",
        NATURAL,
    )
    freeze_steps: str = field(
        "", "duration for which freeze_blocks are frozen; empty: the whole training"
    )
    freeze_positions: bool = field(
        False, "keep learned positions as they are in init.weights for the whole training"
    )


def check_init(config: "TrainConfig") -> None:
    """Raises UserError if the section `init` of a config does not fit the others."""
    init, depth = config.init, config.model.depth
    check_choice("config.init.decoders", init.decoders, ("auto", "fresh"))
    if init.freeze_blocks > depth:
        raise UserError(
            f"config.init.freeze_blocks {init.freeze_blocks} is more than config.model.depth "
            f"{depth}"
        )
    if init.freeze_steps and not init.freeze_blocks:
        raise UserError("config.init.freeze_steps needs config.init.freeze_blocks above 0")
    if (init.freeze_blocks or init.freeze_positions) and not init.weights:
        raise UserError(
            "config.init.freeze_blocks and freeze_positions need config.init.weights: random "
            "parameters would stay"
        )
