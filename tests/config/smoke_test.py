"""--smoke reduces the sizes of every config, and changes nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest

from dgpt_jax import cli
from dgpt_jax.config import durations, roots, schema, smoke
from dgpt_jax.errors import UserError
from tests.config.roots_test import CONFIGS, names_of, schema_of

UNCHANGED = (
    "task",
    "seed",
    "dtype",
    "loss",
    "hosts",
    "optim.kind",
    "optim.layer_decay",
    "optim.ema",
)


def shrunk(name: str, *texts: str):
    """(ConfigDict before --smoke, parsed config after it) of a file with overrides."""
    kind, config = schema_of(Path(name.partition(":")[0])), cli.load_config(name)
    for text in texts:
        path, _, value = text.partition("=")
        schema.override(config, kind, path, value)
    before = config.copy_and_resolve_references()
    smoke.shrink(config, kind)
    return before, schema.parse(kind, config)


def run_of_smoke(directory, width=smoke.WIDTH):
    (directory / "config.json").write_text(json.dumps({"model": {"width": width}}))
    return f"config.init.weights={directory}"


@pytest.mark.parametrize(
    "name",
    [name for path in sorted(CONFIGS.glob("*.py")) for name in names_of(path)],
    ids=lambda name: Path(name).name,
)
def test_every_config_shrinks(name, tmp_path):
    kind = schema_of(Path(name.partition(":")[0]))
    if kind is roots.TrainConfig:
        flags = ["config.data.path=somewhere"]
        if cli.load_config(name).task == "classify":
            flags.append(run_of_smoke(tmp_path))
        before, small = shrunk(name, *flags)
        assert small.model.width == 32 and small.model.depth == 8 and small.batch_size == 16
        assert durations.steps(small.total, "config.total", batch_size=16, examples=1) == 4
        full = schema.parse(kind, before)
        for field in ("patch", "image_size", "segments", "remat", "eps", "activation"):
            assert getattr(small.model, field) == getattr(full.model, field)
        flat = [schema.flatten(dataclasses.asdict(x)) for x in (full, small)]
        for path in flat[0]:
            if path.startswith(UNCHANGED) or path == "data.path":
                assert flat[0][path] == flat[1][path], path
    elif kind is roots.TokensConfig:
        _, small = shrunk(name, "config.source=somewhere", "config.split=val[10%:]")
        assert small.split == "val[:8]" and small.views == 1
    else:
        _, small = shrunk(name, "config.data=somewhere")
        assert (
            small.max_examples == 32
            and small.test == small.train == "train"
            and small.shots == (0,)
        )


def test_initial_weights_must_be_of_a_tiny_model(tmp_path):
    name = str(CONFIGS / "finetune_b16_in1k.py")
    with pytest.raises(UserError, match="config.init.weights pretrained_b16_in1k"):
        shrunk(name)
    with pytest.raises(UserError, match="--smoke .*config.init.weights"):
        shrunk(name, run_of_smoke(tmp_path, width=768))
    assert not shrunk(name, "config.init.weights=")[1].init.weights
    assert shrunk(name, run_of_smoke(tmp_path))[1].init.weights == str(tmp_path)


def test_it_overrides_other_flags(tmp_path):
    flags = ("config.data.path=x", "config.batch_size=4096", "config.model.taps=(6,12)")
    _, small = shrunk(str(CONFIGS / "pretrain_b16_in1k.py:v5e-16"), *flags)
    assert small.batch_size == 16 and small.accum_steps == 2 and small.model.taps == (4, 5, 7, 8)
