"""What a run can be of. A task has: config, examples, given (arrays to start from), frozen (arrays
that the step reads, not trains), notes, metric_names, abstract_example, init, optimizer, prepare
(None, or of a whole batch what the loss gets), loss, independent (whether an example's loss does
not depend on others of its micro-batch), model_flops, told, then (the next command)."""

from dgpt_jax.tasks import classify, pretrain, probes


def _supervised(config) -> type[classify.Classify]:
    return probes.Probe if config.classify.train == "head" else classify.Classify


def open_task(config):
    """The task of a config with its data. Raises UserError."""
    if config.task == "classify":
        return classify.open_classify(config, _supervised(config))
    return pretrain.open_pretrain(config)


def planned(config):
    """The task of a config without its data."""
    if config.task == "classify":
        return _supervised(config)(config)
    return pretrain.planned(config)


def replayed(config, told: dict):
    """The task of a step that was written down (replay.py)."""
    if config.task == "pretrain":
        return pretrain.replayed(config, told)
    if config.classify.train == "head":
        return probes.Probe(config, start=classify.starting_weights(config))
    return classify.Classify(config)
