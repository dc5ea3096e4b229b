"""Export paths: nothing is overwritten, no partial files remain."""

import os
import re
import shutil
import subprocess
from collections import namedtuple

import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.storage import disk_space
from dgpt_jax.weights import export, files, parity, registry
from tests.support.conversions import convert, convert_error, random_weights
from tests.support.paths import GOLDEN

SOURCE = GOLDEN / "timm_vit_tiny_token.safetensors"


@pytest.fixture
def unchecked(monkeypatch):
    """Skips the check of an export's outputs."""
    monkeypatch.setattr(parity, "outputs", lambda weights: None)
    monkeypatch.setattr(parity, "check", lambda *_: "")


def write(path, name):
    return export.write(random_weights(), registry.LAYOUTS[name], path)


def test_parent_directories_are_created(unchecked, tmp_path):
    write(tmp_path / "a/b/c.safetensors", "safetensors")
    write(tmp_path / "d/e", "hf")
    assert sorted(os.listdir(tmp_path / "a/b")) == ["README.md", "c.safetensors"]
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path / "d/e")) == names
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "d/e").stat().st_mode == plain.stat().st_mode


def test_weights_are_not_overwritten(unchecked, tmp_path):
    write(tmp_path / "a", "hf")
    write(tmp_path / "b.safetensors", "safetensors")
    write(tmp_path / "c", "flax")
    before = sorted(tmp_path.rglob("*"))
    for path, name in [("a", "timm"), ("a", "flax"), ("b.safetensors", "safetensors"), ("c", "hf")]:
        with pytest.raises(UserError, match=str(tmp_path / path)):
            write(tmp_path / path, name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(unchecked, tmp_path, value):
    weights = random_weights()
    name = next(iter(weights.params))
    weights.params[name].reshape(-1)[:2] = value
    with pytest.raises(UserError, match=f"{name} has 2 "):
        export.write(weights, registry.LAYOUTS["hf"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_stay(unchecked, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    write(tmp_path / "a", "timm")
    assert (tmp_path / "a/notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_errors_leave_no_parent_directories(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    words = (SOURCE, tmp_path / "a/b/c", "--to=big_vision", "--heads=3")
    assert "--activation=gelu_tanh" in convert_error(monkeypatch, *words)
    for to, inside in (("timm", "x"), ("safetensors", "x/y.safetensors")):
        words = (SOURCE, tmp_path / "file" / inside, f"--to={to}", "--heads=3")
        assert str(tmp_path / "file") in convert_error(monkeypatch, *words)
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = convert_error(monkeypatch, SOURCE, tmp_path / "a", "--to=timm", "--heads=3")
    assert "a needs 0.38 MB" in message and "free some" in message
    monkeypatch.undo()

    def full(path, *_):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_safetensors", full)
    message = convert_error(monkeypatch, SOURCE, tmp_path / "a", "--to=timm", "--heads=3")
    assert str(tmp_path / "a") in message and "No space left on device" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["timm", "flax", "safetensors"])
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, to):
    """Interrupted between writing and checking."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "outputs", interrupt)
    with pytest.raises(SystemExit) as error:
        convert(monkeypatch, SOURCE, tmp_path / "a/b", f"--to={to}", "--heads=3")
    assert error.value.code == 130 and os.listdir(tmp_path) == []


def test_clip_towers_are_not_encoders(tmp_path, monkeypatch):
    for name in ("clip_tower_tiny.safetensors", "hf_clip_tiny"):
        message = convert_error(monkeypatch, GOLDEN / name, tmp_path / "a", "--to=timm")
        assert "CLIP" in message and "--config.teacher.weights" in message


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False)
    if mount.returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("name", ["out --to=flax", "out.pth --to=digpt", "out --to=timm"])
def test_a_full_disk_is_one_line(name, small_disk, monkeypatch, capfd):
    """Nothing but that line is printed, by threads and native code either. It is found while the
    files are written, not before."""
    monkeypatch.setattr(disk_space, "require", lambda *_: None)
    path, layout = name.split()
    source = GOLDEN / "formats/0.1/exports/full.safetensors"
    heads = ("--heads=3", "--decoder_heads=2")
    error = convert_error(monkeypatch, source, small_disk / path, layout, *heads)
    assert re.match(rf"error: {small_disk / path} cannot be written: .*", error), error
    captured = capfd.readouterr()
    assert not captured.err.removeprefix(error).strip(), captured.err
    assert "Traceback" not in captured.out
    assert not list(small_disk.iterdir())
