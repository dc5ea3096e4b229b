"""--smoke: every config becomes small, and stays what it is."""

import dataclasses
import json
from pathlib import Path

import pytest

from dgpt_jax import cli, config, durations, schema, smoke
from dgpt_jax.schema import UserError
from tests.config_test import CONFIGS, names_of, schema_of

KEPT = ("task", "seed", "dtype", "loss", "hosts", "optim.kind", "optim.layer_decay", "optim.ema")


def shrunk(name: str, *texts: str):
    """The parsed config of a file with --smoke, after other overrides."""
    kind, made = schema_of(Path(name.partition(":")[0])), cli.load_config(name)
    for text in texts:
        path, _, value = text.partition("=")
        schema.override(made, kind, path, value)
    before = made.copy_and_resolve_references()
    smoke.shrink(made, kind)
    return before, schema.parse(kind, made)


def run_of_smoke(directory, width=smoke.WIDTH):
    (directory / "config.json").write_text(json.dumps({"model": {"width": width}}))
    return f"config.classify.weights={directory}"


@pytest.mark.parametrize(
    "name",
    [name for path in sorted(CONFIGS.glob("*.py")) for name in names_of(path)],
    ids=lambda name: Path(name).name,
)
def test_every_config_shrinks(name, tmp_path):
    kind = schema_of(Path(name.partition(":")[0]))
    if kind is config.Train:
        words = "config.data.path=somewhere", run_of_smoke(tmp_path)
        before, small = shrunk(name, *words)
        assert small.model.width == 32 and small.model.depth == 8 and small.batch_size == 16
        assert durations.steps(small.total, "config.total", batch_size=16, examples=1) == 4
        whole = schema.parse(kind, before)
        for field in ("patch", "image_size", "segments", "remat", "eps", "activation"):
            assert getattr(small.model, field) == getattr(whole.model, field)
        flat = [schema.flatten(dataclasses.asdict(x)) for x in (whole, small)]
        for path in flat[0]:
            if path.startswith(KEPT) or path == "data.path":
                assert flat[0][path] == flat[1][path], path
    elif kind is config.Tokens:
        _, small = shrunk(name, "config.source=somewhere", "config.split=val[10%:]")
        assert small.split == "val[:8]" and small.views == 1
    else:
        _, small = shrunk(name, "config.data=somewhere")
        assert small.most == 32 and small.test == small.train == "train" and small.shots == (0,)


def test_a_tiny_model_takes_the_weights_of_none_but_a_tiny_one(tmp_path):
    name = str(CONFIGS / "finetune_b16_in1k.py")
    with pytest.raises(UserError, match="--smoke trains a tiny model, and pretrained_b16_in1k is"):
        shrunk(name)
    with pytest.raises(UserError, match="is not the run of one"):
        shrunk(name, run_of_smoke(tmp_path, width=768))
    assert not shrunk(name, "config.classify.weights=")[1].classify.weights
    assert shrunk(name, run_of_smoke(tmp_path))[1].classify.weights == str(tmp_path)


def test_it_has_the_last_word(tmp_path):
    words = ("config.data.path=x", "config.batch_size=4096", "config.model.taps=(6,12)")
    _, small = shrunk(str(CONFIGS / "pretrain_b16_in1k.py:v5e-16"), *words)
    assert small.batch_size == 16 and small.accum_steps == 2 and small.model.taps == (4, 5, 7, 8)
