"""Renamed config keys.

In config files and on the command line an old key is an error that names the new one. Stored
configs (of checkpoints, exports, token stores, dumps of bad steps) are translated.
"""

import copy
from collections.abc import Mapping
from typing import Any

# {old: new} keys of TrainConfig, TokensConfig and EvaluateConfig, which do not collide.
RENAMED = {
    "data.bad_most": "data.max_bad_fraction",
    "loss.direct": "loss.distill",
    "optim.bad_steps": "optim.max_skipped_in_a_row",
    "optim.spike": "optim.loss_spike_factor",
    "optim.grid": "optim.base_lr_grid",
    "classify.weights": "init.weights",
    "classify.train": "classify.trainable",
    "classify.erase": "classify.random_erase_prob",
    "classify.smoothing": "classify.label_smoothing",
    "classify.mix_group": "classify.mixup_group_size",
    "evals.most": "evals.max_examples",
    "evals.pictures": "evals.figures",
    "hosts.processes": "hosts.num_processes",
    "hosts.process": "hosts.process_id",
    "like": "codec_from",
    "picture": "image_encoding",
    "picture_size": "image_size",
    "most": "max_examples",
}


def hint(name: str) -> str:
    """Returns ": GROUP.OLD is now GROUP.NEW" for the last component of renamed keys, or ""."""
    matches = [old for old in RENAMED if old.rpartition(".")[2] == name]
    return "".join(f": {old} is now {RENAMED[old]}" for old in matches)


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a stored config, as nested dicts, with today's keys."""
    new = copy.deepcopy({**config})
    for old_key, new_key in RENAMED.items():
        *groups, name = old_key.split(".")
        section = new
        for group in groups:
            section = section.get(group) or {}
        if name in section:
            value = section.pop(name)
            *groups, name = new_key.split(".")
            section = new
            for group in groups:
                section = section.setdefault(group, {})
            section[name] = value
    return new
