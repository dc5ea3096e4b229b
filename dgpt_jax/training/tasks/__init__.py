"""Tasks, by config.task: pretraining, fine-tuning and probes. base.Task is their interface."""

from functools import partial
from typing import Any

from dgpt_jax.config import TrainConfig
from dgpt_jax.training import initial_weights
from dgpt_jax.training.tasks import classify, pretrain, probes
from dgpt_jax.training.tasks.base import Task


def _supervised(config: TrainConfig) -> type[classify.ClassificationTask]:
    return probes.ProbeTask if config.classify.trainable == "head" else classify.ClassificationTask


def open_task(config: TrainConfig) -> Task:
    """The task of a config with its data. Raises UserError."""
    if config.task == "classify":
        return classify.open_classify(config, _supervised(config))
    return pretrain.open_pretrain(config)


def task_without_data(config: TrainConfig) -> Task:
    """The task of a config without its data. Raises UserError."""
    if config.task == "classify":
        return _supervised(config)(config)
    return pretrain.task_without_data(config)


def task_from_dump(config: TrainConfig, metadata: dict[str, Any]) -> Task:
    """The task of a step dumped by bad_step_replay.write. Raises UserError."""
    if config.task == "pretrain":
        return pretrain.task_from_dump(config, metadata)
    if config.classify.trainable == "head":
        read_weights = partial(initial_weights.for_classifier, config)
        return probes.ProbeTask(config, read_weights=read_weights)
    return classify.ClassificationTask(config)
