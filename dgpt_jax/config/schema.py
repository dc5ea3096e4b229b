"""Conversion of `ml_collections.ConfigDict` to frozen dataclasses, with checks and overrides.

A schema is a frozen dataclass whose fields are defined by `field`, with a default and a help text.
Its optional method `resolved` checks values together and fills in defaults that depend on others.
"""

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from dgpt_jax.config import field_values
from dgpt_jax.config.ranges import Range
from dgpt_jax.config.renamed_keys import RENAMED
from dgpt_jax.errors import ChoiceError, UserError

T = TypeVar("T")


def field(default: Any, doc: str, within: Range | None = None, path: bool = False) -> Any:
    """Defines a field of a schema, with its help text.

    within: range of a number, or of each number in a tuple. path: expand a leading `~`.
    """
    metadata = {"doc": doc, "within": within, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def named_group(schema: type, doc: str) -> Any:
    """Defines a field {name: schema} of any number of groups, whose names the user chooses.

    Their keys are `FIELD.NAME.KEY`; a name is a Python identifier.
    """
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "named": schema})


def _fields(schema: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(schema)


def _group(annotation: Any) -> Any:
    """The annotation if it is the schema of a group of keys, else None."""
    return annotation if dataclasses.is_dataclass(annotation) else None


def named_schema(field: dataclasses.Field) -> Any:
    """Returns the schema of the groups of a field by `named_group`, else None."""
    return field.metadata.get("named")


def check_choice(path: str, value: object, allowed: Collection[Any]) -> None:
    """Raises ChoiceError, naming the config key, unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ChoiceError(f"{path} must be one of {choices}, got {value!r}", allowed)


def default_config(schema: type) -> ConfigDict:
    """Returns a schema's defaults as a locked ConfigDict, for a config file to edit."""
    config = ConfigDict()
    for field in _fields(schema):
        if group := _group(field.type):
            config[field.name] = default_config(group)
        elif named_schema(field):
            config[field.name] = ConfigDict()
        elif field.default is None:  # a plain None could not be overridden
            config[field.name] = config_dict.placeholder(field_values.runtime_type(field.type))
        else:
            config[field.name] = field.default
    config.lock()
    for field in filter(named_schema, _fields(schema)):
        named: Any = config[field.name]
        named.unlock()
    return config


def parse(schema: type[T], config: Mapping[str, Any] | ConfigDict, prefix: str = "config") -> T:
    """Returns a ConfigDict, or a dict parsed from JSON, as the frozen dataclass `schema`.

    Missing keys and groups take their defaults. Raises UserError for unknown keys, suggesting the
    nearest one, and for values of a wrong type, out of range or refused by `resolved`.
    """
    fields = {field.name: field for field in _fields(schema)}
    groups = {name: {} for name, field in fields.items() if _group(field.type)}
    values = {}
    for name, value in (groups | dict(config.items())).items():
        if name not in fields:
            raise UserError(_unknown_key(f"{prefix}.{name}", schema))
        path = f"{prefix}.{name}"
        if group := _group(fields[name].type):
            if not hasattr(value, "items"):
                raise UserError(f"{path} is a group of keys, not a value: got {value!r}")
            values[name] = parse(group, value, path)
        elif group := named_schema(fields[name]):
            values[name] = _parse_named(group, value, path)
        else:
            values[name] = field_values.check(fields[name], value, path)
    parsed = schema(**values)
    resolved = getattr(parsed, "resolved", None)
    return resolved() if resolved else parsed


def _parse_named(schema: type, value: Any, path: str) -> dict[str, Any]:
    if not hasattr(value, "items"):
        raise UserError(f"{path} is a group of named groups, not a value: got {value!r}")
    for name, group in value.items():
        _check_name(name, path)
        if not hasattr(group, "items"):
            raise UserError(f"{path}.{name} is a group of keys, not a value: got {group!r}")
    return {name: parse(schema, group, f"{path}.{name}") for name, group in value.items()}


def _check_name(name: str, path: str) -> None:
    if not re.fullmatch(r"[A-Za-z]\w{0,39}", name, re.ASCII):
        raise UserError(
            f"{path}.{name}: a name has letters, digits and underscores, 40 at most, and begins "
            f"with a letter"
        )


def override(config: ConfigDict, schema: type, path: str, text: str) -> None:
    """Sets a key (`config.model.width`) of a schema's ConfigDict to the value of a flag.

    The text is parsed by the field's type: `1e4` is valid for an integer, `(2, 2)`, `0.5,1` and
    `cls,mean` for tuples; `None` is the empty string for a string. Raises UserError.
    """
    section: Any = config
    section_schema, parent, names = schema, "config", path.split(".")[1:]
    for i, name in enumerate(names):
        field = next((f for f in _fields(section_schema) if f.name == name), None)
        if field is None:
            raise UserError(_unknown_key(f"{parent}.{name}", section_schema, schema))
        parent, last = f"{parent}.{name}", i == len(names) - 1
        if group := named_schema(field):
            _override_named(section[name], group, parent, names[i + 1 :], text)
            return
        if bool(_group(field.type)) == last:
            raise UserError(f"{parent} is {'a group of keys' if last else 'a value, not a group'}")
        if last:
            with section.ignore_type():
                value = field_values.parse_text(field.type, text)
                section[name] = field_values.check(field, value, parent)
        else:
            section, section_schema = section[name], _group(field.type)


def _override_named(section: Any, schema: type, path: str, names: list[str], text: str) -> None:
    """Sets a key of a named group, which is created if there is none of the name."""
    if len(names) < 2:
        raise UserError(f"{path} is a group of named groups: set {path}.NAME.KEY")
    _check_name(names[0], path)
    if names[0] not in section:
        section[names[0]] = default_config(schema)
    try:
        override(section[names[0]], schema, ".".join(["config", *names[1:]]), text)
    except UserError as e:
        raise UserError(str(e).replace("config.", f"{path}.{names[0]}.", 1)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a parsed config as nested dicts, for JSON."""
    return dataclasses.asdict(config)


def set_values(config: Any) -> dict[str, Any]:
    """Returns {"model.width": 96} of the values of a parsed config that are not defaults."""
    values, defaults = (flatten(to_dict(x)) for x in (config, type(config)()))
    absent = object()  # keys of named groups have no default
    return {k: value for k, value in values.items() if value != defaults.get(k, absent)}


def flatten(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Returns {"model.width": 8} of {"model": {"width": 8}}."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        nested = isinstance(value, Mapping)
        flat.update(flatten(value, separator, path + separator) if nested else {path: value})
    return flat


def lines(config: Mapping[str, Any]) -> list[str]:
    """Returns a line for each value of nested dicts: `config.model.width = 768`."""
    return [f"config.{name} = {value!r}" for name, value in flatten(config).items()]


def keys(schema: type, prefix: str = "") -> list[str]:
    """Returns the paths of all fields that are not groups: `model.width`."""
    paths = []
    for field in _fields(schema):
        path, group = f"{prefix}{field.name}", _group(field.type) or named_schema(field)
        path += ".NAME" if named_schema(field) else ""
        paths += keys(group, f"{path}.") if group else [path]
    return paths


def describe(schema: type, prefix: str = "--config.") -> str:
    """Returns a paragraph for each field: its flag, type, range, default and help text."""
    paragraphs = []
    for field in _fields(schema):
        if group := _group(field.type):
            paragraphs.append(describe(group, f"{prefix}{field.name}."))
        elif group := named_schema(field):
            about = f"{prefix}{field.name}.NAME.KEY: {field.metadata['doc']}"
            paragraphs.append(_WRAPPER.fill(about))
            paragraphs.append(describe(group, f"{prefix}{field.name}.NAME."))
        else:
            kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            within = field.metadata["within"]
            kind = f"{kind}, {within}" if within else kind
            about = f"({kind}; default {field.default!r}): {field.metadata['doc']}"
            paragraphs.append(_WRAPPER.fill(f"{prefix}{field.name} {about}"))
    return "\n".join(paragraphs)


_WRAPPER = textwrap.TextWrapper(
    98, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False,
    break_long_words=False,
)  # fmt: skip


def _unknown_key(path: str, schema: type, root: type | None = None) -> str:
    """Message about an unknown key, with its new name, or with the same or a similar name."""
    prefix, _, name = path.rpartition(".")
    if new := RENAMED.get(path.removeprefix("config.")):
        return f"config key {path} is now config.{new}"
    names = [field.name for field in _fields(schema)]
    paths = {f"config.{key}": key.rpartition(".")[2] for key in (keys(root) if root else ())}
    matches = [path for path, last in paths.items() if last == name]
    matches = matches or [f"{prefix}.{n}" for n in _similar(name, names, 0.5)]
    similar = _similar(name, paths.values(), 0.6)
    matches = matches or [path for path, last in paths.items() if last in similar]
    hint = f"did you mean {' or '.join(matches)}?" if matches else f"valid: {', '.join(names)}"
    return f"unknown config key {path}: {hint}"


def _similar(name: str, names: Iterable[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
