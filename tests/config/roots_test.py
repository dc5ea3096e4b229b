"""Config files load and parse; overrides are parsed by type; errors name the key."""

import ast
import json
import re
from pathlib import Path

import pytest

from dgpt_jax.config import files, roots, schema
from dgpt_jax.errors import UserError
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"


def schema_of(path: Path):
    """The schema that a config file imports."""
    text = path.read_text()
    return next(
        s
        for s in (roots.TokensConfig, roots.EvaluateConfig, roots.TrainConfig)
        if s.__name__ in text
    )


def names_of(path: Path) -> list[str]:
    """The file alone, and with each of its arguments: pods, sizes, …"""
    pattern = r"^(?:PODS|SIZES|AFTER|HEADS|LOSSES) = (.*)$"
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    return [str(path)] + [
        f"{path}:{name}" for name in (ast.literal_eval(match[1]) if match else ())
    ]


@pytest.mark.parametrize(
    "name",
    [name for path in sorted(CONFIGS.glob("*.py")) for name in names_of(path)],
    ids=lambda name: Path(name).name,
)
def test_every_config_file_parses(name):
    config, kind = files.load_config(name), schema_of(Path(name.partition(":")[0]))
    for group, name in (("data", "path"), ("source", None), ("data", None)):
        if group in config and name is None and config[group] == "":
            config[group] = "somewhere"
        elif name and group in config and not isinstance(config[group], str):
            config[group][name] = "somewhere"
    parsed = schema.parse(kind, config)
    reloaded = schema.parse(kind, json.loads(json.dumps(schema.to_dict(parsed))))
    assert reloaded == parsed  # config.json reproduces the run


def override(text: str):
    path, value = text.split("=")
    config = schema.default_config(roots.TrainConfig)
    config.data.path = "somewhere"
    schema.override(config, roots.TrainConfig, path, value)
    return schema.parse(roots.TrainConfig, config)


def test_overrides_are_parsed_by_type():
    assert override("config.batch_size=1e3").batch_size == 1000
    assert override("config.optim.blr=1").optim.blr == 1.0
    assert override("config.model.taps=[6,12]").model.taps == (6, 12)
    assert override("config.model.taps=None").model.taps == (6, 8, 10, 12)
    assert override("config.data.crop_scale=0.5,1").data.crop_scale == (0.5, 1.0)
    assert override("config.data.flip=false").data.flip is False
    assert override("config.data.path=1").data.path == "1"
    assert override("config.model.segments=(2, 7)").model.segments == (2, 7)
    assert override("config.profile=0,5").profile == (0, 5)
    assert override("config.profile=None").profile is None
    assert override("config.data.views=None").data.views is None
    assert override("config.data.bad_records=None").data.bad_records is None
    assert override("config.wandb=None").wandb == ""
    assert override("config.platform=None").platform == ""
    assert override("config.checkpoint.keep_every=None").checkpoint.keep_every == ""


@pytest.mark.parametrize("text", ["cls,mean", "[cls, mean]", "('cls', 'mean')", "cls, mean,"])
def test_lists_of_names(text):
    config = schema.default_config(roots.EvaluateConfig)
    schema.override(config, roots.EvaluateConfig, "config.features", text)
    assert config.features == ("cls", "mean")
    schema.override(config, roots.EvaluateConfig, "config.features", "cls")
    assert config.features == ("cls",)
    with pytest.raises(UserError, match=r"config.shots\[0\] must be int, got 'few'"):
        schema.override(config, roots.EvaluateConfig, "config.shots", "few")


@pytest.mark.parametrize(
    "text,message",
    [
        ("config.modle.width=8", "unknown config key config.modle: did you mean config.model?"),
        ("config.model.widht=8", "did you mean config.model.width?"),
        ("config.lr=1", "unknown config key config.lr: did you mean config.optim.blr?"),
        ("config.width=8", "config.width: did you mean config.model.width or config.teacher.width"),
        ("config.teacher.depth=8", "config.teacher.depth: did you mean config.model.depth?"),
        ("config.optim.flip=8", "config.optim.flip: did you mean config.data.flip?"),
        ("config.zzzzzz=8", "unknown config key config.zzzzzz: valid: task, seed"),
        ("config.model=8", "config.model is a group"),
        ("config.seed.x=8", "config.seed is a value"),
        ("config.batch_size=1.5", "config.batch_size must be int, got 1.5"),
        ("config.batch_size=True", "config.batch_size must be int, got True"),
        ("config.data.flip=2", "config.data.flip must be bool"),
        ("config.model.segments=3", "config.model.segments takes 2 values"),
        ("config.model.segments=3,3", "config.model.segments (3, 3) do not divide"),
        ("config.model.taps=(3, 13)", "config.model.taps must increase within 1..12"),
        ("config.model.width=6", "config.model.width 6 must be a multiple of 4"),
        ("config.data.targets=pixels", "set loss.visible to 0"),
        ("config.data.targets=online", "needs config.teacher.weights"),
        ("config.accum_steps=3", "config.batch_size 4096 is not divisible by config.accum_steps"),
        ("config.data.lanes=3", "config.data.lanes 3 does not divide config.batch_size"),
        ("config.data.path=None", "config.data.path is empty"),
        ("config.dtype=None", "config.dtype must be one of bfloat16, float32, got ''"),
        ("config.total=300", "config.total: cannot read the duration '300'"),
        ("config.total=5%", "config.total: cannot read the duration '5%'"),
        ("config.optim.warmup=None", "config.optim.warmup: cannot read the duration ''"),
        ("config.checkpoint.every=often", "config.checkpoint.every: cannot read the duration"),
        ("config.checkpoint.keep_every=-1 steps", "config.checkpoint.keep_every: cannot read"),
        ("config.evals.every=1 day", "config.evals.every: cannot read the duration '1 day'"),
        ("config.dtype=float16", "must be one of bfloat16, float32"),
        ("config.profile=3", "config.profile takes 2 values"),
        ("config.batch_size=1" + 20 * "0", "config.batch_size is 100000000000000000000: too large"),
        ("config.optim.blr=1e999", "config.optim.blr is inf"),
        ("config.optim.blr={[]: 1}", "config.optim.blr must be float, got '{[]: 1}'"),
        ("config.data.crop_ratio=2,1", "config.data.crop_ratio (2.0, 1.0) must be MIN, MAX"),
        ("config.data.crop_scale=1,0.5", "config.data.crop_scale (1.0, 0.5) must be MIN, MAX"),
        ("config.profile=5,5", "config.profile (5, 5) must be START, STOP"),
    ],
)
def test_errors_are_one_line_that_names_the_key(text, message):
    with pytest.raises(UserError) as caught:
        override(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_distillation_needs_the_last_block_and_teacher_features():
    config = schema.default_config(roots.TrainConfig)
    config.data.path = "somewhere"
    config.loss.update(next=0.0, visible=0.0, distill=1.0)
    assert schema.parse(roots.TrainConfig, config).loss.distill == 1
    config.data.targets = "pixels"
    with pytest.raises(UserError, match=r"pixels .*set loss.distill to 0"):
        schema.parse(roots.TrainConfig, config)
    config.data.targets = "stored"
    config.model.taps = (6, 8)
    with pytest.raises(UserError, match=r"taps must end with 12 \(depth\), got \(6, 8\)"):
        schema.parse(roots.TrainConfig, config)
    config.loss.distill = 0.0
    with pytest.raises(UserError, match=r"config.loss needs a positive weight"):
        schema.parse(roots.TrainConfig, config)


def test_missing_groups_take_their_defaults():
    assert schema.parse(roots.TrainConfig, {"data": {"path": "x"}}).model.width == 768
