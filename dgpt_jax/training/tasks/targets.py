"""Prediction targets of pretraining: stored tokens, tokens of an online teacher, or pixels."""

from dataclasses import dataclass

from dgpt_jax.config import TrainConfig
from dgpt_jax.data import token_store
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError
from dgpt_jax.weights import teacher_loading


@dataclass(frozen=True)
class Target:
    """Prediction targets: width C, the teacher's square grid, with or without its CLS token, and
    the codec of stored tokens."""

    width: int
    grid: tuple[int, int]
    cls: bool
    codec: Codec | None = None

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.grid[0] * self.grid[1] + self.cls


def online_target(config: TrainConfig, teacher: teacher_loading.Loaded | None) -> Target:
    """Returns the Target of a teacher within the step, or of pixels."""
    if teacher:
        tower = teacher.tower
        return Target(tower.token_width, tower.grid, cls=tower.cls)
    return Target(3 * config.model.patch**2, (config.model.grid, config.model.grid), cls=False)


def stored_target(config: TrainConfig, expected: Target | None = None) -> Target:
    """Returns the Target of the token store of a config.

    Raises UserError if its width or grid differ from `expected` (default: config.teacher), or its
    source from config.data.source.
    """
    path, info = config.data.path, token_store.StoreInfo.load(config.data.path)
    if config.data.source:
        name, _, version = config.data.source.partition(":")
        source = info.source
        if name != source["name"] or version not in ("", source["version"]):
            raise UserError(
                f"{path} is a store of {source['name']}:{source['version']}, the config expects "
                f"{config.data.source} (config.data.source)"
            )
    for name, stored, value in (
        ("width", info.teacher.width, expected.width if expected else config.teacher.width),
        ("grid", info.teacher.grid[0], expected.grid[0] if expected else config.teacher.grid),
    ):
        if value is not None and value != stored:
            raise UserError(
                f"{path} holds teacher tokens of {name} {stored}, the config expects {value} "
                f"(config.teacher.{name})"
            )
    teacher = info.teacher
    return Target(teacher.width, teacher.grid, teacher.cls, teacher.load_codec(path))
