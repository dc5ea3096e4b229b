"""Where an export goes: nothing is written over, nothing half-written is left."""

import os
import shutil
from collections import namedtuple

import pytest

from dgpt_jax.convert import export, files, formats, parity
from dgpt_jax.schema import UserError
from tests.conversions import convert, random_weights, refused
from tests.paths import GOLDEN

SOURCE = GOLDEN / "timm_vit_tiny_token.safetensors"


@pytest.fixture
def unchecked(monkeypatch):
    """What an export computes is for other tests."""
    monkeypatch.setattr(parity, "outputs", lambda weights: None)
    monkeypatch.setattr(parity, "check", lambda *_: "")


def write(path, name):
    return export.write(random_weights(), formats.LAYOUTS[name], path)


def test_parents_are_made(unchecked, tmp_path):
    write(tmp_path / "a/b/c.safetensors", "safetensors")
    write(tmp_path / "d/e", "hf")
    assert sorted(os.listdir(tmp_path / "a/b")) == ["README.md", "c.safetensors"]
    made = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path / "d/e")) == made
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "d/e").stat().st_mode == plain.stat().st_mode


def test_weights_are_not_written_over(unchecked, tmp_path):
    write(tmp_path / "a", "hf")
    write(tmp_path / "b.safetensors", "safetensors")
    write(tmp_path / "c", "flax")
    before = sorted(tmp_path.rglob("*"))
    for path, name in [("a", "timm"), ("a", "flax"), ("b.safetensors", "safetensors"), ("c", "hf")]:
        with pytest.raises(UserError, match="is there already: name another place"):
            write(tmp_path / path, name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(unchecked, tmp_path, value):
    weights = random_weights()
    name = next(iter(weights.params))
    weights.params[name].reshape(-1)[:2] = value
    with pytest.raises(UserError, match=f"{name} has 2 values that are not finite"):
        export.write(weights, formats.LAYOUTS["hf"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_stay(unchecked, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    write(tmp_path / "a", "timm")
    assert (tmp_path / "a/notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_refusals_leave_no_parents(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    words = (SOURCE, tmp_path / "a/b/c", "--to=big_vision", "--heads=3")
    assert "has activation gelu_tanh" in refused(monkeypatch, *words)
    for to, inside in (("timm", "x"), ("safetensors", "x/y.safetensors")):
        words = (SOURCE, tmp_path / "file" / inside, f"--to={to}", "--heads=3")
        assert "file is a file" in refused(monkeypatch, *words)
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused(monkeypatch, SOURCE, tmp_path / "a", "--to=timm", "--heads=3")
    assert "needs 0.4 MB, its disk has 0.0 MB left" in message
    monkeypatch.undo()

    def full(path, *_):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_safetensors", full)
    message = refused(monkeypatch, SOURCE, tmp_path / "a", "--to=timm", "--heads=3")
    assert message.endswith("a cannot be written: No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["timm", "flax", "safetensors"])
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, to):
    """In the middle: the weights are written, and not yet checked."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "outputs", interrupted)
    with pytest.raises(SystemExit) as ended:
        convert(monkeypatch, SOURCE, tmp_path / "a/b", f"--to={to}", "--heads=3")
    assert ended.value.code == 130 and os.listdir(tmp_path) == []


def test_a_clip_tower_is_no_encoder(tmp_path, monkeypatch):
    for name in ("clip_tower_tiny.safetensors", "hf_clip_tiny"):
        message = refused(monkeypatch, GOLDEN / name, tmp_path / "a", "--to=timm")
        assert "holds a tower of CLIP or SigLIP: a teacher" in message
