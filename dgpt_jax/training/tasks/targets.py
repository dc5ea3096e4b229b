"""Prediction targets of pretraining: stored tokens, tokens of an online teacher, or pixels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from dgpt_jax.config import TrainConfig
from dgpt_jax.config.data import TeacherConfig
from dgpt_jax.data import further_teachers, token_statistics, token_store
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.data.token_statistics import TokenStatistics
from dgpt_jax.errors import UserError
from dgpt_jax.models import digpt
from dgpt_jax.weights import teacher_loading


@dataclass(frozen=True)
class Target:
    """Prediction targets: width C, the teacher's square grid, with or without its CLS token, and
    the codec of stored tokens.

    normalize: what is done to decoded tokens (config.teacher.normalize), with `statistics` unless
    it is "none". directory: of the statistics.
    """

    width: int
    grid: tuple[int, int]
    cls: bool
    codec: Codec | None = None
    normalize: str = "none"
    statistics: TokenStatistics | None = None
    directory: str = ""

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.grid[0] * self.grid[1] + self.cls

    def decode(self, stored: jax.Array) -> jax.Array:
        """Returns the targets (…, T, C) float32 of stored tokens."""
        assert self.codec is not None, "there are no stored tokens"
        tokens = self.codec.decode(stored)
        return self.statistics.normalize(tokens, self.normalize) if self.statistics else tokens


def to_json(target: Target) -> dict[str, Any]:
    """Returns a target as JSON, for `from_json`."""
    codec, values = target.codec, {}
    if codec is not None:
        values["codec"] = {"name": codec.name, "scale": codec.scale.tolist()}
    if target.statistics is not None:
        values["normalize"] = {"kind": target.normalize, "directory": target.directory}
    return {"width": target.width, "grid": target.grid, "cls": target.cls} | values


def from_json(values: Mapping[str, Any]) -> Target:
    """Inverse of `to_json`. Old dumps have no codec: their tokens are decoded floats, which the
    float16 codec passes through. Raises UserError if the statistics are not there any more."""
    codec = values.get("codec", {"name": "float16", "scale": []})
    kind, statistics = "none", None
    if normalize := values.get("normalize"):
        kind = normalize["kind"]
        statistics = token_statistics.load(normalize["directory"], values["width"], "dgpt tokens")
    return Target(
        values["width"],
        tuple(values["grid"]),
        values["cls"],
        Codec(codec["name"], np.array(codec["scale"], np.float32)),
        kind,
        statistics,
    )


def online_target(config: TrainConfig, teacher: teacher_loading.Loaded | None) -> Target:
    """Returns the Target of a teacher within the step, or of pixels."""
    if teacher:
        tower = teacher.tower
        return Target(tower.token_width, tower.grid, cls=tower.cls)
    return Target(3 * config.model.patch**2, (config.model.grid, config.model.grid), cls=False)


def stored_targets(
    config: TrainConfig, expected: Mapping[str, Target] | None = None
) -> dict[str, Target]:
    """Returns {teacher: Target} of the teachers with a loss weight, of the token store of a config;
    the first is named "".

    Raises UserError if a width or grid differs from `expected` (default: config.teacher and
    config.teachers), or the store's source from config.data.source.
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
    targets = {}
    for name, settings in active_teachers(config).items():
        stored, directory = info.teacher, epath.Path(path)
        if name:
            stored, directory = further_teachers.load_finished(path, name)
        key = f"config.teachers.{name}" if name else "config.teacher"
        known = expected[name] if expected else None
        for field, value, required in (
            ("width", stored.width, known.width if known else settings.width),
            ("grid", stored.grid[0], known.grid[0] if known else settings.grid),
        ):
            if required is not None and required != value:
                raise UserError(
                    f"{directory} holds teacher tokens of {field} {value}, the config expects "
                    f"{required} ({key}.{field})"
                )
        codec, kind, statistics = stored.load_codec(directory), settings.normalize, None
        if kind != "none" and known is None:  # held-out tokens are normalized as training's
            statistics = token_statistics.load(directory, stored.width, info.command)
        targets[name] = Target(
            stored.width, stored.grid, stored.cls, codec, kind, statistics, str(directory)
        )
    return targets


def absent_targets(config: TrainConfig) -> dict[str, Target]:
    """Returns the targets of a store that does not exist yet, of int8 tokens. Raises UserError if
    the width or the grid of a teacher is not set."""
    targets = {}
    for name, settings in active_teachers(config).items():
        key = f"config.teachers.{name}" if name else "config.teacher"
        if settings.width is None or settings.grid is None:
            raise UserError(
                f"{config.data.path} does not exist: set {key}.width and {key}.grid to those of "
                f"the tokens that it will hold"
            )
        grid = (settings.grid, settings.grid)
        kind, statistics = settings.normalize, None
        if kind != "none":
            statistics = token_statistics.measure(np.eye(settings.width, dtype=np.float32))
        codec = Codec("int8", np.zeros(0))
        targets[name] = Target(settings.width, grid, True, codec, kind, statistics)
    return targets


def active_teachers(config: TrainConfig) -> dict[str, TeacherConfig]:
    """Returns {name: settings} of the teachers with a loss weight; the first is named ""."""
    teachers: dict[str, TeacherConfig] = {"": config.teacher, **config.teachers}
    return {name: teacher for name, teacher in teachers.items() if teacher.loss_weight}


def loss_weights(config: TrainConfig) -> dict[str, float]:
    """Returns {prediction: weight} of the enabled losses: those of config.loss, times the share of
    each teacher, so that losses keep their scale whatever the number of teachers."""
    teachers = active_teachers(config)
    total = sum(teacher.loss_weight for teacher in teachers.values())
    return {
        digpt.join(head, name): weight * teacher.loss_weight / total
        for name, teacher in teachers.items()
        for head, weight in config.loss.by_head().items()
    }
