"""Commands on invalid or underspecified weights: one line, exit code 1, no files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from dgpt_jax import cli, evaluate
from dgpt_jax.commands import (
    compare_codecs,
    convert,
    embed,
    verify_tokens,
    visualize,
)
from dgpt_jax.config import roots
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_store
from dgpt_jax.planning import training_choice
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import build
from dgpt_jax.weights import mapping, registry
from tests.support.conversions import convert as run_convert
from tests.support.conversions import random_weights
from tests.support.data import image_dataset, random_teacher
from tests.support.paths import ROOT

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images; teachers `unspecified` (no mean and std) and `quick` (QuickGELU with act_kwargs);
    invalid files and directories."""
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("weights")
    image_dataset(root, per_class=4)
    for name, change in (("unspecified", {}), ("quick", {"act_kwargs": {"approximate": "tanh"}})):
        path = random_teacher(root / name) / "open_clip_config.json"
        content = json.loads(path.read_text())
        content["model_cfg"]["vision_cfg"] |= change
        path.write_text(json.dumps({"model_cfg": content["model_cfg"]}))
    torch.save(torch.nn.Linear(2, 2), root / "module.pth")
    torch.save({"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, root / "two.pth")
    (root / "page.pth").write_text("<!DOCTYPE html>\x1b[31m")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    save_file({"net.weight": np.ones(1, np.float32)}, root / "other.safetensors")
    for name, text in (("list", "[]"), ("args", '{"model_args": {"rope": true, "num_heads": 3}}')):
        (root / name).mkdir()
        registry.LAYOUTS["timm"].save(random_weights(), root / name)
        (root / name / "config.json").write_text(text)
    return root


CONVERT = ["tools/convert.py", "{weights}", "{out}", "--to=timm"]
BUILD = [
    "tools/build_tokens.py", "--config=configs/quickstart_tokens.py", "--out={out}",
    "--config.source={root}/images", "--config.teacher.weights={weights}",
]  # fmt: skip
TRAIN = [
    "-m", "dgpt_jax.train", "--config=configs/quickstart.py", "--workdir={out}",
    "--config.data.path={root}/images", "--config.data.targets=online",
    "--config.teacher.weights={weights}",
]  # fmt: skip
EVALUATE = [
    "-m", "dgpt_jax.evaluate", "--config=configs/knn_in1k.py", "--checkpoint={weights}",
    "--config.data={root}/images", "--out={out}",
]  # fmt: skip
ROWS = [
    (CONVERT, "module.pth", "torch.nn.modules.linear.Linear"),
    (CONVERT, "two.pth", "student, teacher"),
    (CONVERT, "list", "JSON list"),
    (CONVERT, "args", "rope true"),
    (CONVERT, "other.safetensors", "net.weight"),
    (BUILD, "unspecified", "config.teacher.mean and config.teacher.std"),
    (BUILD, "quick", "act_kwargs"),
    (BUILD, "pointer.safetensors", "git-LFS"),
    (TRAIN, "unspecified", "config.teacher.mean and config.teacher.std"),
    (
        [*TRAIN, "--config.teacher.mean=(123.7,116.3,103.5)"],
        "unspecified",
        "config.teacher.mean[0]",
    ),
    (EVALUATE, "page.pth", "web page"),
]


@pytest.mark.parametrize(("words", "weights", "message"), ROWS)
def test_errors(root, tmp_path, words, weights, message):
    paths = {"root": root, "weights": root / weights, "out": tmp_path / "out"}
    result = subprocess.run(
        [sys.executable, *(word.format(**paths) for word in words)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line == lines[-1] and message in line and line.isprintable()
    assert len(lines) == 1
    assert os.listdir(tmp_path) == []


def test_mean_and_std_by_the_config(root, tmp_path, monkeypatch, capsys):
    """They are stored in the token store, and verify_tokens uses them."""
    teacher = {"weights": str(root / "unspecified"), "mean": MEAN, "std": STD}
    settings = dict(
        source=str(root / "images"), teacher=teacher, image_size=16, image_encoding="png",
        shard_size=16, batch_size=8, threads=2,
    )  # fmt: skip
    build.build(parse(roots.TokensConfig, settings), tmp_path / "tokens")
    tower = token_store.StoreInfo.load(tmp_path / "tokens").teacher.weights["tower"]
    assert (tower["mean"], tower["std"]) == (list(MEAN), list(STD))
    words = [str(tmp_path / "tokens"), f"--weights={root / 'unspecified'}"]
    monkeypatch.setattr(sys, "argv", ["verify_tokens", *words])
    cli.run(verify_tokens.main)
    *_, sound, suggested = capsys.readouterr().out.splitlines()
    assert sound.startswith("sound: least")
    examples = len(tfds_dataset.Split(str(tmp_path / "tokens"), "view000"))
    assert suggested.endswith(f" --config.batch_size={training_choice.small_batch(examples)}")
    monkeypatch.setattr(sys, "argv", ["verify_tokens", *words, "--samples=0"])
    with pytest.raises(SystemExit, match="--samples: 0 "):
        cli.run(verify_tokens.main)


ENCODER_FLAGS = ("--heads",)
TEACHER_FLAGS = ("--heads", "--activation", "--image_size", "--mean", "--std")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (evaluate, ENCODER_FLAGS),
        (embed, ENCODER_FLAGS),
        (visualize, (*ENCODER_FLAGS, "--decoder_heads")),
        (convert, (*ENCODER_FLAGS, "--decoder_heads")),
        (verify_tokens, TEACHER_FLAGS),
        (compare_codecs, TEACHER_FLAGS),
    ],
)
def test_flags_for_weights_without_json(command, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    shown = capsys.readouterr().out
    assert [flag for flag in flags if f"\n  {flag} " not in shown] == []


def test_flags_replace_the_json(root, tmp_path, monkeypatch, capsys):
    """compare_codecs prints the same for a teacher with its settings in JSON or in flags."""
    complete = random_teacher(tmp_path / "complete")
    preprocess = json.loads((complete / "open_clip_config.json").read_text())["preprocess_cfg"]
    tables = []
    for weights in (complete, root / "unspecified"):
        words = [f"--images={root / 'images'}", f"--weights={weights}", "--examples=2"]
        if weights != complete:
            monkeypatch.setattr(sys, "argv", ["compare_codecs", *words])
            with pytest.raises(SystemExit, match=r"--mean and --std"):
                cli.run(compare_codecs.main)
            for name in ("mean", "std"):
                words.append(f"--{name}={','.join(map(str, preprocess[name]))}")
        monkeypatch.setattr(sys, "argv", ["compare_codecs", *words])
        capsys.readouterr()
        cli.run(compare_codecs.main)
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines if " ms " not in line and line.startswith("| int8")])
    assert tables[0] == tables[1] and tables[0]


def test_convert_prints_the_selected_weights(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    weights = random_weights(width=192)
    state = mapping.write(registry.LAYOUTS["timm"].table(weights), weights.params)
    arrays = {name: torch.tensor(array) for name, array in state.items()}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": arrays, "state_dict_ema": arrays}, path)
    run_convert(monkeypatch, path, tmp_path / "out", "--to=timm", "--heads=3")
    out = capsys.readouterr().out
    assert f"{path}: using the weights under state_dict; others are {path}#state_dict_ema" in out
    run_convert(monkeypatch, f"{path}#state_dict_ema", tmp_path / "ema", "--to=timm", "--heads=3")
    out = capsys.readouterr().out
    assert f"of {path}#state_dict_ema in layout timm" in out
