"""Between an `ml_collections.ConfigDict` and frozen dataclasses.

A schema is a frozen dataclass whose fields have defaults and a `doc`, made by `entry`; its own
`resolved()`, where it has one, checks the values together and fills in what follows from others.
"""

import ast
import dataclasses
import difflib
import os
import textwrap
import types
import typing

from ml_collections import config_dict

# Numbers are less than these, so that no arithmetic with them overflows.
LARGEST = {int: 2**63, float: 1e300}


class UserError(Exception):
    """Something the user can mend. Commands print its one line, no traceback, and exit with 1."""


def printable(text: str) -> str:
    """Text whose control characters are escaped, so that names of files cannot move the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may have: bounds of an interval (`least` and `most` belong to it,
    `above` and `below` do not), and single values `also` taken."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, value) -> bool:
        return value in self.also or not (
            (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.most is not None and value > self.most)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        bounds = ((text, getattr(self, name)) for name, text in words.items())
        text = " and ".join(f"{text} {bound}" for text, bound in bounds if bound is not None)
        return " or ".join([*map(str, self.also), text])


COUNT = Range(least=1)
NATURAL = Range(least=0)  # 0 and whole numbers, or whatever is not negative
POSITIVE = Range(above=0)
SHARE = Range(least=0, most=1)
BELOW_1 = Range(least=0, below=1)


def entry(default, doc: str, within: Range | None = None, path: bool = False):
    """A field of a schema.

    One of numbers, or of a tuple of them, states the Range of each; in a `path` a leading `~` is
    expanded.
    """
    metadata = {"doc": doc, "within": within, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def expand(path: str) -> str:
    """The path with a leading `~` or `~user` expanded. Raises UserError where that home directory
    is unknown."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path.partition('/')[0]} of {path} is no user: write ./~ for that name")
    return expanded


def one_of(path: str, value, allowed):
    """Raises UserError unless `value` is among `allowed`."""
    if value not in allowed:
        raise UserError(f"{path} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def default(schema) -> config_dict.ConfigDict:
    """A schema's fields at their defaults, as a locked ConfigDict for a config file to edit."""
    config = config_dict.ConfigDict()
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            config[field.name] = default(field.type)
        elif field.default is None:  # a placeholder, because a plain None cannot be overridden
            config[field.name] = config_dict.placeholder(_kind(field.type))
        else:
            config[field.name] = field.default
    return config.lock()


def parse(schema, config, prefix: str = "config"):
    """A ConfigDict (or plain dict, as JSON gives it) as the frozen dataclass `schema`.

    Absent keys take their defaults; `resolved` fills in absent groups, too. Raises UserError for an
    unknown key, with the nearest known one, or a value of the wrong type.
    """
    known = {field.name: field for field in dataclasses.fields(schema)}
    groups = {name: {} for name, field in known.items() if dataclasses.is_dataclass(field.type)}
    values = {}
    for name, value in (groups | dict(config.items())).items():
        if name not in known:
            raise UserError(_unknown(f"{prefix}.{name}", schema))
        values[name] = _value(known[name], value, f"{prefix}.{name}")
    parsed = schema(**values)
    return parsed.resolved() if hasattr(parsed, "resolved") else parsed


def override(config: config_dict.ConfigDict, schema, path: str, text: str):
    """Sets `config.model.width`, in the ConfigDict of a schema, to what `text` means there.

    `1e4` is an integer where one is due; `(2, 2)`, `0.5,1` and `cls,mean` mean what they say.
    `None` means none: of a text, the empty one.
    """
    root, parent, names = schema, "config", path.split(".")[1:]
    for i, name in enumerate(names):
        field = next((f for f in dataclasses.fields(schema) if f.name == name), None)
        if field is None:
            raise UserError(_unknown(f"{parent}.{name}", schema, root))
        parent, last = f"{parent}.{name}", i == len(names) - 1
        if dataclasses.is_dataclass(field.type) == last:
            raise UserError(f"{parent} is {'a group of keys' if last else 'a value, not a group'}")
        if last:
            with config.ignore_type():
                config[name] = _value(field, _literal(field.type, text), parent)
        else:
            config, schema = config[name], field.type


def to_dict(config) -> dict:
    """A parsed config as plain nested dicts, for JSON."""
    return dataclasses.asdict(config)


def flatten(config: dict, prefix: str = "") -> dict:
    """{"model": {"width": 8}} as {"model.width": 8}."""
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, dict) else {path: value})
    return flat


def lines(config: dict) -> list[str]:
    """A line for each value of nested dicts: `config.model.width = 768`."""
    return [f"config.{name} = {value!r}" for name, value in flatten(config).items()]


def keys(schema, prefix: str = "") -> list[str]:
    """The paths of all fields that hold a value: `model.width`."""
    found = []
    for field in dataclasses.fields(schema):
        path = f"{prefix}{field.name}"
        found += keys(field.type, f"{path}.") if dataclasses.is_dataclass(field.type) else [path]
    return found


def describe(schema, prefix: str = "--config.") -> str:
    """A paragraph for each field: its flag, type, default and doc."""
    told = []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            told.append(describe(field.type, f"{prefix}{field.name}."))
        else:
            kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            within = field.metadata["within"]
            stated = f"{kind}, {within}" if within else kind
            about = f"({stated}; default {field.default!r}): {field.metadata['doc']}"
            told.append(_WRAPPED.fill(f"{prefix}{field.name} {about}"))
    return "\n".join(told)


_WRAPPED = textwrap.TextWrapper(
    98, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False,
    break_long_words=False,
)  # fmt: skip


def _unknown(path: str, schema, root=None) -> str:
    """What to say of an unknown key: the same name elsewhere in `root`, or the nearest one."""
    prefix, _, name = path.rpartition(".")
    names = [field.name for field in dataclasses.fields(schema)]
    every = {f"config.{key}": key.rpartition(".")[2] for key in (keys(root) if root else ())}
    near = [key for key, last in every.items() if last == name]
    near = near or [f"{prefix}.{n}" for n in _near(name, names, 0.5)]
    near = near or [key for key, last in every.items() if last in _near(name, every.values(), 0.6)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(names)}"
    return f"unknown config key {path}: {hint}"


def _near(name: str, names, cutoff: float) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)


def _optional(annotation) -> bool:
    return isinstance(annotation, types.UnionType)


def _required(annotation):
    """`int` of `int | None`."""
    if _optional(annotation):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _kind(annotation) -> type:
    """The runtime type: tuple of `tuple[int, int] | None`."""
    annotation = _required(annotation)
    return typing.get_origin(annotation) or annotation


def _literal(annotation, text: str):
    """The Python value of a flag's text; strings stay as they are."""
    if text == "None" and (_optional(annotation) or _kind(annotation) is str):
        return None if _optional(annotation) else ""
    if _kind(annotation) is str:
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # "{[]: 1}", "((((…"
        value = {"true": True, "false": False}.get(text.lower(), text)
    if _kind(annotation) is tuple and isinstance(value, str):  # names: cls,mean or [cls, mean]
        value = [part.strip(" '\"") for part in text.strip(" ()[]").split(",") if part.strip()]
    elif _kind(annotation) is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    return value


def _value(field, value, path: str):
    """`value` as the field has it, within its range or with its home directory, or UserError."""
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


def _coerce(annotation, value, path: str):
    """`value` as the annotation has it, or UserError."""
    if dataclasses.is_dataclass(annotation):
        if not hasattr(value, "items"):
            raise UserError(f"{path} is a group of keys, not a value: got {value!r}")
        return parse(annotation, value, path)
    if value is None and _optional(annotation):
        return None
    kind = _kind(annotation)
    if kind is tuple and isinstance(value, (list, tuple)):  # JSON turns tuples into lists
        inner = typing.get_args(_required(annotation))
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UserError(f"{path} takes {len(inner)} values, got {value!r}")
        return tuple(_coerce(inner[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if type(value) in (int, float) and kind in (int, float):
        if not abs(value) < LARGEST[kind]:  # nor is NaN
            raise UserError(f"{path} is {value!r}, more than any use or not a number")
        if kind is float or float(value).is_integer():
            return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path} must be {kind.__name__}, got {value!r}")
    return value
