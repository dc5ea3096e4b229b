"""Commands on weights that are none, or not told enough of: one line, exit code 1, nothing made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import verify_tokens
from safetensors.numpy import save_file

from dgpt_jax import build, cli, config, token_store
from dgpt_jax.convert import formats, layout
from dgpt_jax.schema import parse
from tests.conversions import convert, random_weights
from tests.data import image_dataset, random_teacher

ROOT = Path(__file__).parent.parent
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images; teachers `untold` (no mean and std) and `quick` (QuickGELU with act_kwargs); files
    and directories that are no weights."""
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("weights")
    image_dataset(root, per_class=4)
    for name, change in (("untold", {}), ("quick", {"act_kwargs": {"approximate": "tanh"}})):
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
        formats.LAYOUTS["timm"].save(random_weights(), root / name)
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
    (CONVERT, "module.pth", "it holds torch.nn.modules.linear.Linear"),
    (CONVERT, "two.pth", "several state dicts: it has them under student, teacher: give"),
    (CONVERT, "list", "config.json holds a JSON list, an object is expected"),
    (CONVERT, "args", "rope true"),
    (CONVERT, "other.safetensors", "the first of its 1 arrays are net.weight"),
    (BUILD, "untold", "set config.teacher.mean and config.teacher.std"),
    (BUILD, "quick", "act_kwargs"),
    (BUILD, "pointer.safetensors", "is a git-LFS pointer"),
    (TRAIN, "untold", "set config.teacher.mean and config.teacher.std"),
    ([*TRAIN, "--config.teacher.mean=(123.7,116.3,103.5)"], "untold", "config.teacher.mean[0]"),
    (EVALUATE, "page.pth", "is a web page, not the file"),
]


@pytest.mark.parametrize(("words", "weights", "message"), ROWS)
def test_refused_in_one_line(made, tmp_path, words, weights, message):
    places = {"root": made, "weights": made / weights, "out": tmp_path / "out"}
    ended = subprocess.run(
        [sys.executable, *(word.format(**places) for word in words)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    lines = ended.stderr.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line == lines[-1] and message in line and line.isprintable()
    assert len(lines) == 1 or "dgpt_jax.train" in words  # which shows its devices before
    assert "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == []


def test_a_store_of_a_teacher_that_the_config_tells_of(made, tmp_path, monkeypatch, capsys):
    """Its mean and std are in the store, and verify_tokens takes them from there."""
    teacher = {"weights": str(made / "untold"), "mean": MEAN, "std": STD}
    settings = dict(
        source=str(made / "images"), teacher=teacher, picture_size=16, picture="png",
        shard_size=16, batch_size=8, threads=2,
    )  # fmt: skip
    build.build(parse(config.Tokens, settings), tmp_path / "tokens")
    tower = token_store.StoreInfo.load(tmp_path / "tokens").teacher["tower"]
    assert (tower["mean"], tower["std"]) == (list(MEAN), list(STD))
    words = [str(tmp_path / "tokens"), f"--weights={made / 'untold'}"]
    monkeypatch.setattr(sys, "argv", ["verify_tokens", *words])
    cli.run(verify_tokens.main)
    assert "sound: least" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["verify_tokens", *words, "--samples=0"])
    with pytest.raises(SystemExit, match="argument --samples: 0 is not a number from 1 on"):
        cli.run(verify_tokens.main)


def test_convert_says_which_weights_it_takes(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    weights = random_weights(width=192)
    state = layout.write(formats.LAYOUTS["timm"].table(weights), weights.params)
    arrays = {name: torch.tensor(array) for name, array in state.items()}
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": arrays, "state_dict_ema": arrays}, path)
    convert(monkeypatch, path, tmp_path / "out", "--to=timm", "--heads=3")
    out = capsys.readouterr().out
    assert (
        f"{path}: its weights under state_dict are taken; others are {path}#state_dict_ema" in out
    )
    convert(monkeypatch, f"{path}#state_dict_ema", tmp_path / "ema", "--to=timm", "--heads=3")
    out = capsys.readouterr().out
    assert f"the encoder, pooling cls of {path}#state_dict_ema in layout timm" in out
