"""tools/checkpoint.py on a work directory with two checkpoints."""

import importlib.util
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dgpt_jax
from dgpt_jax import checkpoint, cli, config, optim, saving, schema, state
from dgpt_jax.convert import formats, layout, weights
from dgpt_jax.schema import UserError
from tests.conversions import convert

MODEL = dict(
    width=16, depth=2, heads=2, patch=8, image_size=16, decoder_width=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work directory with the steps 3 and 7, {step: flat parameters})."""
    path = tmp_path_factory.mktemp("run")
    settings = schema.default(config.Train)
    with settings.ignore_type():
        settings.model.update(MODEL)
    settings.data.path = "store"
    train = schema.parse(config.Train, settings)
    tx = optim.optimizer(train.optim, lambda step: 1e-3)
    shapes, params = weights.full_shapes(train.model, 8), {}
    with saving.Checkpoints(path, keep=3) as checkpoints:
        for step in (3, 7):
            rng = np.random.default_rng(step)
            flat = {p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()}
            made = jax.tree.map(jnp.asarray, layout.unflatten(flat))
            made = state.TrainState(jnp.int32(step), made, tx.init(made))
            checkpoints.save(made, {"config": schema.to_dict(train)})
            params[step] = flat
    return path, params


def command(monkeypatch, *words):
    """Loaded by its path: other tests know `checkpoint` as the package's module."""
    file = Path(__file__).parent.parent / "tools/checkpoint.py"
    spec = importlib.util.spec_from_file_location("checkpoint_tool", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, words)])
    cli.run(tool.main)


def test_inspect(run, monkeypatch, capsys):
    command(monkeypatch, "inspect", run[0])
    out = capsys.readouterr().out
    kernel = next(line for line in out.splitlines() if line.startswith("params/next/pred/kernel"))
    assert "(8, 8)  float32" in kernel and kernel.endswith(" 256")
    size = sum(x.nbytes for x in run[1][7].values())
    assert f"params {size / 1e6:.1f} MB, opt_state {2 * size / 1e6:.1f} MB" in out


def test_a_step_that_is_not_there(run, monkeypatch):
    has = "no finished checkpoint of step 5: it has 3, 7"
    with pytest.raises(SystemExit, match=f"^error: .* holds {has}$"):
        command(monkeypatch, "inspect", run[0], "--step=5")
    with pytest.raises(UserError, match=has):
        checkpoint.load_params(run[0], 5)


def test_a_damaged_checkpoint(run, monkeypatch, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/7/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SystemExit, match="error: .*checkpoints/7 is damaged: "):
        convert(monkeypatch, tmp_path / "run", tmp_path / "out", "--to=timm")
    assert not (tmp_path / "out").exists()


def test_one_of_the_checkpoints(run, tmp_path):
    for name, step in (("checkpoints/3", 3), ("checkpoints/7", 7), ("checkpoints", 7)):
        found, one = formats.read(run[0] / name)
        assert found.name == "flax" and one.run["step"] == step
        for path, array in one.params.items():
            np.testing.assert_array_equal(array, run[1][step][path])
    (tmp_path / "checkpoints/12").mkdir(parents=True)
    with pytest.raises(UserError, match="12 is neither a work directory with checkpoints nor"):
        formats.read(tmp_path / "checkpoints/12")
    with pytest.raises(UserError, match="has 2 heads, 4 are given"):
        formats.read(run[0], heads=4)


def test_average(run, monkeypatch, tmp_path):
    command(monkeypatch, "average", run[0], tmp_path / "mean", "--last=2")
    found = layout.flatten(dgpt_jax.load_digpt(tmp_path / "mean").params)
    for path, array in found.items():
        expected = (run[1][3][path].astype(np.float64) + run[1][7][path]) / 2
        np.testing.assert_array_equal(array, expected.astype(np.float32))
    assert "mean of the steps 3, 7" in (tmp_path / "mean/README.md").read_text()
    command(monkeypatch, "inspect", tmp_path / "mean")  # it has no optimizer state
    with pytest.raises(SystemExit, match="has 2 checkpoints, not 3"):
        command(monkeypatch, "average", run[0], tmp_path / "other", "--last=3")


def test_moving_average(run, monkeypatch, tmp_path):
    command(monkeypatch, "average", run[0], tmp_path / "ema", "--last=2", "--decay=0.75")
    found = layout.flatten(dgpt_jax.load_digpt(tmp_path / "ema").params)
    for path, array in found.items():
        expected = 0.75 * run[1][3][path].astype(np.float64) + 0.25 * run[1][7][path]
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
    assert (
        "moving average (decay 0.75) of the steps 3, 7" in (tmp_path / "ema/README.md").read_text()
    )
    with pytest.raises(SystemExit, match="decay 1 is not in"):
        command(monkeypatch, "average", run[0], tmp_path / "other", "--last=2", "--decay=1")


def test_extract_and_card(run, monkeypatch, tmp_path, capsys):
    (run[0] / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 0.75, "knn": 61.5}\n{"step": 7, "loss": 0.5}\n'
        '{"step": 9, "loss": 0.1}\n{"step": 9, "lo'  # killed while it wrote
    )
    command(monkeypatch, "extract", run[0], tmp_path / "a.safetensors")
    found = layout.flatten(dgpt_jax.load_digpt(tmp_path / "a.safetensors").params)
    assert all(np.array_equal(found[p], x) for p, x in run[1][7].items())
    card = (tmp_path / "README.md").read_text()
    assert "| loss | 0.5 | 7 |" in card and "| knn | 61.5 | 5 |" in card
    assert "| step | 7 |" in card and "| data | store |" in card
    assert "optim.weight_decay = 0.05" in card and "SHA-256 of `a.safetensors`" in card


def test_a_card_tells_how_to_load(run, monkeypatch, tmp_path):
    """The lines for dgpt_jax run as they stand; those of transformers where it is there."""
    for to in ("hf", "timm"):
        convert(monkeypatch, run[0], tmp_path / to, f"--to={to}")
        card = (tmp_path / to / "README.md").read_text()
        snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]
        assert [len(s.splitlines()) for s in snippets] == [3, 3]
        if to == "hf":
            pytest.importorskip("transformers")
            names: dict = {}
            exec("\n".join(snippets[0].splitlines()[:2]).replace(", ViTImageProcessor", ""), names)
            assert names["model"].config.hidden_size == 16
        names = {"pictures": np.zeros((2, 16, 16, 3), np.uint8)}
        exec(snippets[1], names)
        assert names["features"].shape == (2, 16)


def test_a_readme_that_is_not_ours_stays(run, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_bytes(b"caf\xe9")  # in no UTF-8
    convert(monkeypatch, run[0], tmp_path / "a.safetensors", "--to=safetensors")
    assert (tmp_path / "README.md").read_bytes() == b"caf\xe9"
    assert "tools/convert.py for a.safetensors" in (tmp_path / "a.safetensors.md").read_text()


def test_the_onnx_recipe(run, monkeypatch, tmp_path):
    """The lines of the README, on an export."""
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    convert(monkeypatch, run[0], tmp_path / "EXPORT_HF", "--to=hf")
    text = (Path(__file__).parent.parent / "README.md").read_text()
    block = text.split("ONNX comes out")[1].split("\n\n")[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(line[4:] for line in block.splitlines()), names)
    found, torch = onnx.load("model.onnx"), names["torch"]
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(found)
    tokens = evaluator.run(None, {"pixel_values": images.numpy()})[0]
    with torch.no_grad():
        expected = names["model"](images).last_hidden_state.numpy()
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
