"""tools/checkpoint.py on a work directory with two checkpoints."""

import ast
import importlib.util
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dgpt_jax
from dgpt_jax import cli
from dgpt_jax.config import roots, schema
from dgpt_jax.errors import UserError
from dgpt_jax.storage import orbax_checkpoint
from dgpt_jax.training import checkpointing, optimizer, train_step
from dgpt_jax.weights import mapping, registry, types
from tests.docs import pages
from tests.support.conversions import convert
from tests.support.paths import ROOT

MODEL = dict(
    width=16, depth=2, heads=2, patch=8, image_size=16, decoder_width=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work directory with steps 3 and 7, {step: flat parameters})."""
    path = tmp_path_factory.mktemp("run")
    settings = schema.default_config(roots.TrainConfig)
    with settings.ignore_type():
        settings.model.update(MODEL)
    settings.data.path = "store"
    train = schema.parse(roots.TrainConfig, settings)
    tx = optimizer.optimizer(train.optim, lambda step: 1e-3)
    shapes, params = types.full_shapes(train.model, 8), {}
    with checkpointing.Checkpoints(path, keep=3) as checkpoints:
        for step in (3, 7):
            rng = np.random.default_rng(step)
            flat = {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}
            nested = jax.tree.map(jnp.asarray, mapping.unflatten(flat))
            train_state = train_step.TrainState(jnp.int32(step), nested, tx.init(nested))
            checkpoints.save(train_state, {"config": schema.to_dict(train)})
            params[step] = flat
    return path, params


def command(monkeypatch, *words):
    """Runs the tool by its path, since `checkpoint` is a module of the package in other tests."""
    file = ROOT / "tools/checkpoint.py"
    spec = importlib.util.spec_from_file_location("checkpoint_tool", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, words)])
    cli.run(tool.main)


def test_inspect(run, monkeypatch, capsys):
    command(monkeypatch, "inspect", run[0])
    summary = capsys.readouterr().out
    assert len(summary.splitlines()) < 30  # a screen
    blocks = {line.split()[0]: line.split()[1:] for line in summary.splitlines()[1:-3]}
    assert blocks["params/next/pred"] == ["2", "72", "0.00", "float32"]
    command(monkeypatch, "inspect", run[0], "--all")
    out = capsys.readouterr().out
    rows = [line.split("  ") for line in out.splitlines()[1:-2]]
    assert len(rows) == sum(int(columns[0]) for columns in blocks.values())
    values = sum(math.prod(ast.literal_eval(row[1])) for row in rows)
    assert values == sum(int(columns[1].replace(",", "")) for columns in blocks.values())
    kernel = next(line for line in out.splitlines() if line.startswith("params/next/pred/kernel"))
    assert "(8, 8)  float32" in kernel and kernel.endswith(" 256")
    size = sum(x.nbytes for x in run[1][7].values())
    totals = f"params {size / 1e6:.1f} MB, opt_state {2 * size / 1e6:.1f} MB"
    assert totals in summary and totals in out


def test_a_missing_step(run, monkeypatch):
    with pytest.raises(SystemExit, match="^error: .*step 5.* 3, 7$"):
        command(monkeypatch, "inspect", run[0], "--step=5")
    with pytest.raises(UserError, match="step 5.* 3, 7"):
        orbax_checkpoint.load_params(run[0], 5)


def test_a_damaged_checkpoint(run, monkeypatch, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/7/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SystemExit, match="error: .*checkpoints/7 "):
        convert(monkeypatch, tmp_path / "run", tmp_path / "out", "--to=timm")
    assert not (tmp_path / "out").exists()


def test_selecting_a_checkpoint(run, tmp_path):
    for name, step in (("checkpoints/3", 3), ("checkpoints/7", 7), ("checkpoints", 7)):
        layout, weights = registry.read(run[0] / name)
        assert layout.name == "flax" and weights.run["step"] == step
        for path, array in weights.params.items():
            np.testing.assert_array_equal(array, run[1][step][path])
    (tmp_path / "checkpoints/12").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints/12 "):
        registry.read(tmp_path / "checkpoints/12")
    with pytest.raises(UserError, match="heads 2, .* 4"):
        registry.read(run[0], heads=4)


def test_average(run, monkeypatch, tmp_path):
    command(monkeypatch, "average", run[0], tmp_path / "mean", "--last=2")
    params = mapping.flatten(dgpt_jax.load_digpt(tmp_path / "mean").params)
    for path, array in params.items():
        expected = (run[1][3][path].astype(np.float64) + run[1][7][path]) / 2
        np.testing.assert_array_equal(array, expected.astype(np.float32))
    assert "mean of steps 3, 7" in (tmp_path / "mean/README.md").read_text()
    command(monkeypatch, "inspect", tmp_path / "mean")  # without optimizer state
    with pytest.raises(SystemExit, match="2 checkpoints, not 3"):
        command(monkeypatch, "average", run[0], tmp_path / "other", "--last=3")


def test_moving_average(run, monkeypatch, tmp_path):
    command(monkeypatch, "average", run[0], tmp_path / "ema", "--last=2", "--decay=0.75")
    params = mapping.flatten(dgpt_jax.load_digpt(tmp_path / "ema").params)
    for path, array in params.items():
        expected = 0.75 * run[1][3][path].astype(np.float64) + 0.25 * run[1][7][path]
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
    assert "moving average (decay 0.75) of steps 3, 7" in (tmp_path / "ema/README.md").read_text()
    with pytest.raises(SystemExit, match="decay 1 "):
        command(monkeypatch, "average", run[0], tmp_path / "other", "--last=2", "--decay=1")


def test_extract_and_card(run, monkeypatch, tmp_path, capsys):
    (run[0] / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 0.75, "knn": 61.5}\n{"step": 7, "loss": 0.5}\n'
        '{"step": 9, "loss": 0.1}\n{"step": 9, "lo'  # killed while writing
    )
    command(monkeypatch, "extract", run[0], tmp_path / "a.safetensors")
    params = mapping.flatten(dgpt_jax.load_digpt(tmp_path / "a.safetensors").params)
    assert all(np.array_equal(params[p], x) for p, x in run[1][7].items())
    card = (tmp_path / "README.md").read_text()
    assert "| loss | 0.5 | 7 |" in card and "| knn | 61.5 | 5 |" in card
    assert "| step | 7 |" in card and "| data | store |" in card
    assert "optim.weight_decay = 0.05" in card and "SHA-256 of `a.safetensors`" in card
    assert "optim.kind" in card and "kernels" not in card


def test_loading_code_of_a_card(run, monkeypatch, tmp_path):
    """Runs the snippets of dgpt_jax, and of transformers if it is installed."""
    for to in ("hf", "timm"):
        convert(monkeypatch, run[0], tmp_path / to, f"--to={to}")
        card = (tmp_path / to / "README.md").read_text()
        snippets = [block.split("```")[0] for block in card.split("```python\n")[1:]]
        assert [len(s.splitlines()) for s in snippets] == [3, 3]
        if to == "hf":
            pytest.importorskip("transformers")
            names: dict = {}
            exec("\n".join(snippets[0].splitlines()[:2]).replace(", ViTImageProcessor", ""), names)
            assert names["model"].config.hidden_size == 16
        names = {"images": np.zeros((2, 16, 16, 3), np.uint8)}
        exec(snippets[1], names)
        assert names["features"].shape == (2, 16)


def test_a_foreign_readme_is_not_overwritten(run, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_bytes(b"caf\xe9")  # not UTF-8
    convert(monkeypatch, run[0], tmp_path / "a.safetensors", "--to=safetensors")
    assert (tmp_path / "README.md").read_bytes() == b"caf\xe9"
    assert "tools/convert.py for a.safetensors" in (tmp_path / "a.safetensors.md").read_text()


def test_the_onnx_recipe(run, monkeypatch, tmp_path):
    """Runs the documented lines on an export."""
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    convert(monkeypatch, run[0], tmp_path / "EXPORT_HF", "--to=hf")
    text = (ROOT / "docs/guides/export.md").read_text().partition("## ONNX")[2]
    ((_, block),) = pages.blocks(text)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    model, torch = onnx.load("model.onnx"), names["torch"]
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(model)
    tokens = evaluator.run(None, {"pixel_values": images.numpy()})[0]
    with torch.no_grad():
        expected = names["model"](images).last_hidden_state.numpy()
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
