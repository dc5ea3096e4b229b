"""Weights files: reading, errors, and that no code in them is run."""

import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dgpt_jax
from dgpt_jax.errors import UserError
from dgpt_jax.weights import files
from tests.support.paths import GOLDEN


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.ones(2, np.float16)}
    files.write_safetensors(path, state | {"t": state["x"].T}, {"format": "pt"})
    result = files.read_state(path)
    np.testing.assert_array_equal(result["t"], state["x"].T)
    assert result["n"].dtype == np.float32 and os.listdir(tmp_path) == ["a.safetensors"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="a.safetensors"):
        files.read_state(path)


def test_empty_arrays(tmp_path):
    save_file({"x": np.ones(2, np.float32), "y": np.ones((0, 3), np.float32)}, tmp_path / "a")
    with pytest.raises(UserError, match=r"y .*\(0, 3\)"):
        files.read(tmp_path / "a")


def test_sharded_safetensors(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "2.safetensors")
    index = tmp_path / files.INDEX
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert {k: v.shape for k, v in files.read_state(tmp_path).items()} == {"a": (2,), "b": (3,)}
    index.write_text('{"weight_map": {"a": "../1.safetensors"}}')
    with pytest.raises(UserError, match="outside"):
        files.read_state(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="x is <U4"):
        files.write_safetensors(tmp_path / "a.safetensors", {"x": np.array(["text"])}, {})
    assert os.listdir(tmp_path) == []


def test_hash():
    a, b = np.arange(3.0), np.arange(4.0)
    assert files.hash_state({"a": a, "b": b}) == files.hash_state({"b": b, "a": a})
    assert files.hash_state({"a": a}) != files.hash_state({"a": a + 1})
    assert files.hash_state({"a": a}) != files.hash_state({"a": a[None]})


def test_official_pth_with_its_namespace():
    pytest.importorskip("torch")
    state = files.read_state(GOLDEN / "digpt_tiny.pth")
    expected = load_file(GOLDEN / "digpt_tiny.safetensors")
    assert set(expected) <= set(state)
    for name in expected:
        np.testing.assert_array_equal(state[name], expected[name])


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['DGPT_TEST_MARK']}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    mark = tmp_path / "mark"
    monkeypatch.setenv("DGPT_TEST_MARK", str(mark))
    torch.save({"model": Malicious()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(UserError, match=name):
            files.read_state(tmp_path / name)
    assert not mark.exists()
    pickle.loads((tmp_path / "old.pth").read_bytes())  # the pickle works
    assert mark.exists()


def test_torchscript_is_refused_with_a_remedy(tmp_path):
    torch = pytest.importorskip("torch")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "openai.pt"))
    with pytest.raises(UserError, match="TorchScript.*torch.jit.load.*safetensors"):
        files.read_state(tmp_path / "openai.pt")


def test_broken_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(1000)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="a.pth"):
        files.read_state(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth"):
        files.read_state(tmp_path / "list.pth")
    (tmp_path / "a.h5").write_text("")
    with pytest.raises(UserError, match="a.h5.*.safetensors"):
        files.read_state(tmp_path / "a.h5")


def test_load_digpt_from_the_official_files():
    pytest.importorskip("torch")
    expected = np.load(GOLDEN / "digpt_tiny_expected.npz")
    rng = np.random.default_rng(7)
    images = rng.standard_normal((2, 3, 224, 224)).astype(np.float32).transpose(0, 2, 3, 1)
    tokens = rng.standard_normal((2, 257, 1024)).astype(np.float32)
    with pytest.raises(UserError, match="--heads and --decoder_heads"):
        dgpt_jax.load_digpt(GOLDEN / "digpt_tiny.pth")
    model = dgpt_jax.load_digpt(GOLDEN / "digpt_tiny.pth", heads=3, decoder_heads=2)
    losses = model.losses(images, tokens, expected["perm"])
    np.testing.assert_allclose(losses["next"], expected["next_loss"], rtol=1e-5)
    np.testing.assert_allclose(losses["visible"], expected["visible_loss"], rtol=1e-5)
