"""Configs: frozen dataclasses with a type, range, default and help text for each field.

A config file returns `default_config(TrainConfig)` with its own values; `schema.parse` converts it,
with the command line's overrides, to a checked dataclass. Start with roots.py; model.py, data.py,
optimization.py, classification.py, initialization.py and run.py define the groups of keys.
"""

from dgpt_jax.config.classification import ClassificationConfig
from dgpt_jax.config.data import DataConfig, TeacherConfig
from dgpt_jax.config.initialization import InitConfig
from dgpt_jax.config.model import ModelConfig
from dgpt_jax.config.optimization import LossConfig, OptimConfig
from dgpt_jax.config.roots import EvaluateConfig, TokensConfig, TrainConfig
from dgpt_jax.config.run import CheckpointConfig, EvalsConfig, HostsConfig, MeshConfig
from dgpt_jax.config.schema import check_choice, default_config

__all__ = [
    "CheckpointConfig", "ClassificationConfig", "DataConfig", "EvalsConfig", "EvaluateConfig",
    "HostsConfig", "InitConfig", "LossConfig", "MeshConfig", "ModelConfig", "OptimConfig",
    "TeacherConfig", "TokensConfig", "TrainConfig", "check_choice", "default_config",
]  # fmt: skip
