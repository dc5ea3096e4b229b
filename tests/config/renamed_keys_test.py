"""Renamed config keys: errors that name the new key, and translation of stored configs."""

import pytest

from dgpt_jax import cli
from dgpt_jax.config import renamed_keys, roots, schema
from dgpt_jax.errors import UserError

SCHEMAS = (roots.TrainConfig, roots.TokensConfig, roots.EvaluateConfig)


def nested(key: str, value) -> dict:
    """{"a": {"b": value}} of "a.b"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def schema_of(key: str) -> type:
    """The root schema that has a key."""
    return next(s for s in SCHEMAS if key in schema.keys(s))


@pytest.mark.parametrize("old,new", renamed_keys.RENAMED.items())
def test_an_old_key_is_an_error_that_names_the_new_one(tmp_path, old, new):
    kind = schema_of(new)
    message = f"{old} is now .*{new}"
    config = schema.default_config(kind)
    with pytest.raises(UserError, match=message):
        schema.override(config, kind, f"config.{old}", "1")
    with pytest.raises(UserError, match=message):
        schema.parse(kind, nested(old, 1))
    path = tmp_path / "config.py"
    path.write_text(
        f"from dgpt_jax.config import {kind.__name__}, default_config\n"
        f"def get_config():\n"
        f"    config = default_config({kind.__name__})\n"
        f"    config.{old} = 1\n"
        f"    return config\n"
    )
    with pytest.raises(UserError, match=rf"config.py:4: .*{message}"):
        cli.load_config(str(path))


def test_translation_of_a_stored_config():
    stored = {
        "task": "classify",
        "loss": {"next": 1.0, "direct": 0.5},
        "classify": {"weights": "run", "train": "head", "erase": 0.1, "mixup": 0.8},
        "evals": {"most": 5},
    }
    copy = {name: dict(x) if isinstance(x, dict) else x for name, x in stored.items()}
    assert renamed_keys.translate(stored) == {
        "task": "classify",
        "loss": {"next": 1.0, "distill": 0.5},
        "classify": {"trainable": "head", "random_erase_prob": 0.1, "mixup": 0.8},
        "init": {"weights": "run"},
        "evals": {"max_examples": 5},
    }
    assert stored == copy


@pytest.mark.parametrize("old,new", renamed_keys.RENAMED.items())
def test_every_row_is_translated(old, new):
    translated = schema.flatten(renamed_keys.translate(nested(old, 1)))
    assert translated == {new: 1}
    assert renamed_keys.translate(nested(new, 1)) == nested(new, 1)


def test_no_old_key_is_valid():
    assert not set(renamed_keys.RENAMED) & {key for s in SCHEMAS for key in schema.keys(s)}
