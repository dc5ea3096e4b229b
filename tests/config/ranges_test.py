"""Every number of every schema has a range, and errors state it."""

import dataclasses
import types
import typing

import pytest

from dgpt_jax.config import ranges, roots, schema
from dgpt_jax.errors import UserError

SCHEMAS = {
    roots.TrainConfig: {"data": {"path": "x"}},
    roots.TokensConfig: {"source": "x"},
    roots.EvaluateConfig: {"data": "x"},
}


def fields(kind, prefix=()):
    """(names along the path, field) of every value in a schema."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, (*prefix, field.name))
        elif named := schema.named_schema(field):
            yield from fields(named, (*prefix, field.name, "other"))
        else:
            yield (*prefix, field.name), field


def types_in(annotation) -> set:
    """All types in an annotation."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation):
        return set().union(*map(types_in, typing.get_args(annotation)))
    return {annotation}


NUMBERS = [
    (kind, keys, field)
    for kind in SCHEMAS
    for keys, field in fields(kind)
    if types_in(field.type) & {int, float}
]


def with_value(base: dict, keys: tuple, value) -> dict:
    """The nested dict with one value added."""
    name, *rest = keys
    return base | {name: with_value(base.get(name, {}), rest, value) if rest else value}


def outside(within: ranges.Range) -> list[float]:
    """Numbers just outside the bounds of a range."""
    values = []
    if within.least is not None:
        values += [within.least - 1]
    if within.above is not None:
        values += [within.above]
    if within.most is not None:
        values += [within.most + 1]
    if within.below is not None:
        values += [within.below]
    return [value for value in values if value not in within.also]


@pytest.mark.parametrize(
    "kind,keys,field",
    NUMBERS,
    ids=[f"{kind.__name__}.{'.'.join(keys)}" for kind, keys, _ in NUMBERS],
)
def test_numbers_have_a_range_that_is_checked(kind, keys, field):
    within = field.metadata["within"]
    assert within is not None, f"{kind.__name__}.{'.'.join(keys)} states no range"
    assert within.least is not None or within.above is not None
    default = field.default if isinstance(field.default, tuple) else (field.default,)
    assert all(number is None or number in within for number in default)
    inner = typing.get_args(field.type)
    is_tuple = tuple in {typing.get_origin(t) for t in (field.type, *inner)}
    for number in outside(within):
        length = len(field.default or (0, 0)) if is_tuple else 1
        value = (number,) * length if is_tuple else number
        path = f"config.{'.'.join(keys)}" + "[0]" * is_tuple
        with pytest.raises(UserError) as caught:
            schema.parse(kind, with_value(SCHEMAS[kind], keys, value))
        shown = float(number) if float in types_in(field.type) else number
        assert str(caught.value) == f"{path} must be {within}, got {shown}"


def test_every_schema_has_numbers():
    assert {kind for kind, _, _ in NUMBERS} == set(SCHEMAS) and len(NUMBERS) > 80


@pytest.mark.parametrize(
    "text,message",
    [
        ("config.optim.clip_norm=-1", "config.optim.clip_norm must be at least 0, got -1.0"),
        ("config.optim.blr=-1e-4", "config.optim.blr must be at least 0, got -0.0001"),
        ("config.optim.b2=1.5", "config.optim.b2 must be at least 0 and below 1, got 1.5"),
        (
            "config.optim.loss_spike_factor=0.5",
            "config.optim.loss_spike_factor must be 0 or above 1, got 0.5",
        ),
        ("config.mesh.fsdp=0", "config.mesh.fsdp must be -1 or at least 1, got 0"),
        ("config.data.crop_scale=0,1", "crop_scale[0] must be above 0 and at most 1, got 0.0"),
        (
            "config.optim.base_lr_grid=0.1,-1",
            "config.optim.base_lr_grid[1] must be above 0, got -1.0",
        ),
    ],
)
def test_on_the_command_line(text, message):
    path, value = text.split("=")
    with pytest.raises(UserError) as caught:
        schema.override(schema.default_config(roots.TrainConfig), roots.TrainConfig, path, value)
    assert message in str(caught.value)


def test_help_states_the_range():
    text = schema.describe(roots.TrainConfig)
    assert "--config.optim.b2 (float, at least 0 and below 1; default 0.95)" in text
