"""Values of fields: in the type of the annotation, range checked, and as the text of a flag."""

import ast
import dataclasses
import os
import types
import typing
from typing import Any

from dgpt_jax.errors import UserError

# Exclusive bounds of numbers, so that arithmetic with them does not overflow.
LARGEST = {int: 2**63, float: 1e300}


def expand(path: str) -> str:
    """Returns the path with a leading `~` or `~user` expanded. Raises UserError if there is no such
    user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(f"{path}: there is no user {user}: write ./~ for a file of that name")
    return expanded


def parse_text(annotation: Any, text: str) -> Any:
    """Returns the Python value of a flag's text; unchanged for strings."""
    if text == "None" and (_optional(annotation) or runtime_type(annotation) is str):
        return None if _optional(annotation) else ""
    if runtime_type(annotation) is str:
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # "{[]: 1}", "((((…"
        value = {"true": True, "false": False}.get(text.lower(), text)
    if runtime_type(annotation) is tuple and isinstance(value, str):  # cls,mean or [cls, mean]
        value = [s.strip(" '\"") for s in text.strip(" ()[]").split(",") if s.strip()]
    elif runtime_type(annotation) is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    return value


def check(field: dataclasses.Field, value: Any, path: str) -> Any:
    """Returns `value` in the type of the field, range checked, `~` expanded. Raises UserError."""
    value, within = _coerce(field.type, value, path), field.metadata.get("within")
    if field.metadata.get("path"):
        try:
            return expand(value)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    if within is not None and value is not None:
        for i, number in enumerate(value if isinstance(value, tuple) else (value,)):
            if number not in within:
                item = f"{path}[{i}]" if isinstance(value, tuple) else path
                raise UserError(f"{item} must be {within}, got {number}")
    return value


def _coerce(annotation: Any, value: Any, path: str) -> Any:
    """`value` in the type of the annotation. Raises UserError."""
    if value is None and _optional(annotation):
        return None
    kind = runtime_type(annotation)
    if kind is tuple and isinstance(value, (list, tuple)):  # JSON turns tuples into lists
        inner = typing.get_args(_required(annotation))
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UserError(f"{path} takes {len(inner)} values, got {value!r}")
        return tuple(_coerce(inner[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(value, int | float) and not isinstance(value, bool) and kind in (int, float):
        if not abs(value) < LARGEST[kind]:  # also for NaN
            raise UserError(f"{path} is {value!r}: too large, or not a number")
        if kind is float or float(value).is_integer():
            return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path} must be {kind.__name__}, got {value!r}")
    return value


def runtime_type(annotation: Any) -> type:
    """Returns the runtime type of an annotation: tuple for `tuple[int, int] | None`."""
    annotation = _required(annotation)
    return typing.get_origin(annotation) or annotation


def _optional(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType)


def _required(annotation: Any) -> Any:
    """int for `int | None`."""
    if _optional(annotation):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation
