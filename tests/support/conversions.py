"""Small random weights, and calls of tools/convert.py."""

import json
import sys

import numpy as np
import pytest

from dgpt_jax import cli
from dgpt_jax.config import ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.weights.types import Preprocess, Weights, encoder_model, encoder_shapes, full_shapes

HEADS = {"heads": 3, "decoder_heads": 2}
HALF = (0.5, 0.5, 0.5)
SQUASH = Preprocess(HALF, HALF, "bilinear", 1.0, "squash")


def random_weights(pooling="cls", classes=0, preprocess=SQUASH, **changes) -> Weights:
    """An encoder with random parameters only."""
    sizes = dict(width=24, patch=4, heads=3, depth=2, mlp_width=40, image_size=16) | changes
    model = encoder_model(**sizes)
    rng = np.random.default_rng(0)
    params = {
        path: rng.standard_normal(shape).astype(np.float32) * (0.3 if len(shape) > 1 else 1)
        for path, shape in encoder_shapes(model, pooling, classes).items()
    }
    return Weights(model, params, pooling, "random", preprocess)


def pretrained(**changes) -> Weights:
    """A pretraining model with random parameters only; its head counts are HEADS."""
    sizes = dict(width=24, patch=4, depth=4, image_size=16, decoder_width=16, decoder_depth=2)
    model = parse(ModelConfig, sizes | HEADS | changes)
    rng = np.random.default_rng(0)
    params = {
        path: 0.3 * rng.standard_normal(shape).astype(np.float32)
        for path, shape in full_shapes(model, 8).items()
    }
    return Weights(model, params, None, "random")


def convert(monkeypatch, *words):
    """Runs the command with these arguments."""
    from dgpt_jax.commands import convert as tool

    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    cli.run(tool.main)


def convert_error(monkeypatch, *words) -> str:
    """The one-line error of the command."""
    with pytest.raises(SystemExit) as error:
        convert(monkeypatch, *words)
    message = error.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def same(a: Weights, b: Weights):
    """Asserts equal geometry, preprocessing and parameters."""
    assert (a.model, a.pooling, a.preprocess) == (b.model, b.pooling, b.preprocess)
    assert set(a.params) == set(b.params)
    for path in a.params:
        np.testing.assert_array_equal(a.params[path], b.params[path])


def change_json(directory, changes: dict):
    """Changes files in place, {file: {"a.b": value}, its text, or None to remove it}."""
    for name, change in changes.items():
        path = directory / name
        if change is None:
            path.unlink()
        elif isinstance(change, str):
            path.write_text(change)
        else:
            content = json.loads(path.read_text()) if path.exists() else {}
            for key, value in change.items():
                *groups, last = key.split(".")
                node = content
                for group in groups:
                    node = node.setdefault(group, {})
                node[last] = value
            path.write_text(json.dumps(content))
    return directory
