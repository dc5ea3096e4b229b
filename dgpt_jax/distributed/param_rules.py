"""One mechanism for everything per parameter: path regex → value, the first match wins."""

import re
from collections.abc import Sequence
from typing import Any

import jax

Rules = Sequence[tuple[str, Any]]


def path_of(key_path) -> str:
    """A JAX key path as "encoder/blocks/attn/qkv/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def match(rules: Rules, path: str):
    """The value of the first rule whose regex is found in the path; ValueError if none is."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise ValueError(f"no rule covers the parameter {path}")


def apply(rules: Rules, tree):
    """A tree of values, one a leaf. Every leaf must be covered."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match(rules, path_of(path)), tree)
