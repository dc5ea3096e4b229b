"""--smoke reduces the sizes of every config, and changes nothing else."""

import dataclasses
import json
import re
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
        config = cli.load_config(name)
        if config.task == "classify" or config.init.weights:
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


def parsed(name: str, kind: type, capsys, *flags: str):
    """(config, lines printed) of a command line with --smoke."""
    words = [f"--config={CONFIGS / name}", "--smoke", *(f"--config.{flag}" for flag in flags)]
    config = cli.parse(cli.parser("", kind), kind, words)[1]
    return config, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "name,kind,flags,line",
    [
        (
            "pretrain_b16_in1k.py:v5e-16",
            roots.TrainConfig,
            ("data.path=x", "total=100 epochs", "batch_size=256", "model.taps=(6,12)", "seed=3"),
            "total 100 epochs -> 4 steps, batch_size 256 -> 16, model.taps 6,12 -> unset",
        ),
        ("pretrain_b16_in1k.py", roots.TrainConfig, ("data.path=x", "batch_size=8"), ""),
        ("pretrain_b16_in1k.py", roots.TrainConfig, ("data.path=x", "log_every=1"), ""),
        (
            "tokens_in1k_openclip_h14.py",
            roots.TokensConfig,
            ("source=x", "views=4", "split=val[:0.5%]", "batch_size=2"),
            "views 4 -> 1, split val[:0.5%] -> val[:8]",
        ),
        (
            "knn_in1k.py",
            roots.EvaluateConfig,
            ("data=x", "train=a[:9]+b", "test=val", "k=5,50", "max_examples=7"),
            "train a[:9]+b -> a, test val -> a, k 5,50 -> 5",
        ),
    ],
)
def test_reduced_flags_are_said(name, kind, flags, line, capsys):
    assert parsed(name, kind, capsys, *flags)[1] == ([f"--smoke: {line}"] if line else [])


@pytest.mark.parametrize(
    "name,kind,flag,message",
    [
        ("pretrain_b16_in1k.py", roots.TrainConfig, "total=100 epoks", "config.total: cannot read"),
        ("pretrain_b16_in1k.py", roots.TrainConfig, "total=5 epochs", "config.optim.warmup="),
        ("pretrain_b16_in1k.py", roots.TrainConfig, "checkpoint.every=1 day", "checkpoint.every:"),
        ("pretrain_b16_in1k.py", roots.TrainConfig, "data.lanes=3", "config.data.lanes 3"),
        ("pretrain_b16_in1k.py", roots.TrainConfig, "platform=tpuu", "config.platform must be"),
        ("pretrain_b16_in1k.py", roots.TrainConfig, "kernels=our", "config.kernels must be"),
        ("pretrain_b16_in1k.py", roots.TrainConfig, "model.heads=5", "config.model"),
        ("tokens_in1k_openclip_h14.py", roots.TokensConfig, "views=0", "config.views must be"),
        ("tokens_in1k_openclip_h14.py", roots.TokensConfig, "split=val[:5", "config.split=val[:5"),
        ("knn_in1k.py", roots.EvaluateConfig, "test=val[5]", "config.test=val[5]"),
        ("knn_in1k.py", roots.EvaluateConfig, "k=", "config.k is empty"),
    ],
)
def test_invalid_values_are_refused_before_they_are_reduced(name, kind, flag, message, capsys):
    path = {roots.TrainConfig: "data.path", roots.TokensConfig: "source"}.get(kind, "data")
    with pytest.raises(UserError, match=re.escape(message)):
        parsed(name, kind, capsys, f"{path}=x", flag)


def test_sizes_still_fit_together(capsys):
    """Batches smaller than those of --smoke are kept, with accumulation and groups of mixup too."""
    flags = ("data.path=x", "init.weights=", "accum_steps=3", "classify.mixup_group_size=6")
    for batch_size, result in ((6, (6, 2, 6)), (24, (16, 2, 16))):
        config, _ = parsed(
            "finetune_b16_in1k.py", roots.TrainConfig, capsys, *flags, f"batch_size={batch_size}"
        )
        sizes = config.batch_size, config.accum_steps, config.classify.mixup_group_size
        assert sizes == result
