"""Values per parameter, from a list of (path regex, value); the first match wins."""

import re
from collections.abc import Sequence
from typing import Any

import jax

Rules = Sequence[tuple[str, Any]]


def path_of(key_path: Sequence[Any]) -> str:
    """Returns a JAX key path as "encoder/blocks/attn/qkv/kernel"."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def match(rules: Rules, path: str) -> Any:
    """Returns the value of the first rule whose regex is found in `path`; else ValueError."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise ValueError(f"no rule covers the parameter {path}")


def apply(rules: Rules, tree: Any) -> Any:
    """Returns a tree of the values of all leaves; each leaf must match a rule."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match(rules, path_of(path)), tree)
