"""Configs, overrides and command lines: a config, or UserError."""

import contextlib
import dataclasses
import io
import json
import math

from hypothesis import strategies as st

from dgpt_jax import cli
from dgpt_jax.config import durations, roots, schema
from dgpt_jax.errors import UserError

SCHEMAS = (roots.TrainConfig, roots.TokensConfig, roots.EvaluateConfig)
CONFIG = """
from dgpt_jax.config import TrainConfig, default_config
def get_config(size="B/16"):
    config = default_config(TrainConfig)
    config.model.size = size
    return config
"""


def fields_of(kind, prefix=""):
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from fields_of(field.type, f"{prefix}{field.name}.")


NAMES = {kind: list(fields_of(kind)) for kind in SCHEMAS}
WORDS = sorted({name.rpartition(".")[2] for names in NAMES.values() for name in names})
TEXT_VALUES = (
    "stored", "online", "pixels", "random", "raster", "float32", "bfloat16", "int8", "int4", "knn",
    "S/16", "H/14", "official", "self", "none", "full", "10%", "3 epochs", "skip", "True", "None",
    "1e4", "(2, 2)", "0.2,1", "[1,2]", "-1", "1" * 5000, "9" * 400, "1e999", "nan", "{[]: 1}",
    "(" * 200, "x'", "0x10", "1_0", "\0",
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([10**30, 10**400, -(10**400)])
)
SCALARS = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.sampled_from(TEXT_VALUES), st.text(max_size=8)
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.tuples(SCALARS, SCALARS),
    st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), SCALARS, max_size=3),
)


@st.composite
def dictionaries(draw, kind):
    """Values by field name, mostly with the right nesting."""
    values = {}
    for name in draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(kind)]))):
        inner = next(f.type for f in dataclasses.fields(kind) if f.name == name)
        nested = dataclasses.is_dataclass(inner) and draw(st.integers(0, 9))
        values[name] = draw(dictionaries(inner) if nested else VALUES)
    if draw(st.integers(0, 9)) == 0:
        values[draw(st.text(max_size=5) | st.sampled_from(WORDS))] = draw(VALUES)
    return values


def parse(draw, _):
    kind = draw(st.sampled_from(SCHEMAS))
    values = draw(dictionaries(kind))
    for name, default in (("data", {"path": "x"}), ("source", "x")):
        if name in {f.name for f in dataclasses.fields(kind)} and name not in values:
            values[name] = "x" if kind is roots.EvaluateConfig else default
    with contextlib.suppress(UserError):
        parsed = schema.parse(kind, values)
        again = schema.parse(kind, json.loads(json.dumps(schema.to_dict(parsed), allow_nan=False)))
        assert again == parsed


TEXTS = st.one_of(
    st.sampled_from(TEXT_VALUES), NUMBERS.map(repr), st.text(max_size=10), VALUES.map(repr)
)


def paths(kind):
    return st.one_of(
        st.sampled_from(NAMES[kind]),
        st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=3).map(".".join),
    )


def override(draw, _):
    kind = draw(st.sampled_from(SCHEMAS))
    config = schema.default_config(kind)
    with contextlib.suppress(UserError):
        for _ in range(draw(st.integers(1, 3))):
            schema.override(config, kind, f"config.{draw(paths(kind))}", draw(TEXTS))
        schema.parse(kind, config)


def command_line(draw, directory):
    file = directory / "config.py"
    file.write_text(CONFIG)
    names = st.sampled_from([str(file), f"{file}:L/16", f"{file}:x", "absent.py", str(directory)])
    word = st.one_of(
        st.tuples(st.just("--config="), names | st.text(max_size=6)).map("".join),
        st.tuples(st.just("--config."), paths(roots.TrainConfig), st.just("="), TEXTS).map("".join),
        st.sampled_from(
            ["--config", "--workdir=x", "--workdir", "--", "-h", "--config.", "-x", "--smoke"]
        ),
        st.sampled_from(["--print_config", "--smok", "--data.path=x"]),
        st.text(max_size=300),
    )
    parser = cli.parser("description", roots.TrainConfig)
    parser.add_argument("--workdir", default="")
    words = draw(st.lists(word, max_size=4))
    if draw(st.integers(0, 4)):
        words = [f"--config={file}", "--config.data.path=x", *words]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            _, parsed = cli.parse(parser, roots.TrainConfig, words)
        assert isinstance(parsed, roots.TrainConfig)
    except UserError as e:
        assert str(e)
    except SystemExit as e:
        assert e.code in (0, None) and (
            "usage" in output.getvalue() or "next:" in output.getvalue()
        ), e


def duration(draw, _):
    text = draw(
        st.one_of(
            st.tuples(NUMBERS.map(repr), st.sampled_from([" epochs", " steps", "%", " x", ""])).map(
                "".join
            ),
            st.text(max_size=12),
        )
    )  # fmt: skip
    numbers = {"batch_size": draw(st.integers(1, 1 << 20)), "examples": draw(st.integers(1, 10**9))}
    with contextlib.suppress(UserError):
        steps = durations.steps(
            text, "config.total", total=draw(st.none() | st.integers(0, 10**9)), **numbers
        )
        assert isinstance(steps, int) and steps >= 0 and math.isfinite(steps)
