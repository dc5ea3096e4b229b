"""What a run can be of. A task has: config, examples, given (arrays to start from), frozen (arrays
that the step reads, not trains), notes, metric_names, abstract_example, init, optimizer, prepare
(None, or of a whole batch what the loss gets), loss, model_flops, told, then (the next command)."""

from dgpt_jax.tasks import classify, pretrain


def open_task(config):
    """The task of a config with its data. Raises UserError."""
    if config.task == "classify":
        return classify.open_classify(config)
    return pretrain.open_pretrain(config)


def planned(config):
    """The task of a config without its data."""
    return classify.planned(config) if config.task == "classify" else pretrain.planned(config)


def replayed(config, told: dict):
    """The task of a step that was written down (replay.py)."""
    if config.task == "classify":
        return classify.replayed(config, told)
    return pretrain.replayed(config, told)
