"""The PyTorch peer of the benchmark computes the official losses and gradients."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dgpt_jax.weights.layouts import digpt as official
from tests.support.paths import GOLDEN

torch = pytest.importorskip("torch")


def test_official_losses_and_gradients():
    from dgpt_jax.weights import official_torch
    from tools.benchmarks import bench_torch

    state = load_file(GOLDEN / "digpt_tiny.safetensors")
    model = official_torch.build(official.model_of(state, 3, 2), state)
    expected = np.load(GOLDEN / "digpt_tiny_expected.npz")
    rng = np.random.default_rng(7)
    images = rng.standard_normal((2, 3, 224, 224)).astype(np.float32)
    tokens = rng.standard_normal((2, 257, 1024)).astype(np.float32)
    inputs = (images * 255, tokens, np.ones(1024, np.float32), expected["perm"])
    next_loss, visible_loss = bench_torch.Losses(model)(*map(torch.from_numpy, inputs), 0.0, 1.0)
    assert next_loss.item() == pytest.approx(float(expected["next_loss"]), rel=1e-5)
    assert visible_loss.item() == pytest.approx(float(expected["visible_loss"]), rel=1e-5)
    (next_loss + visible_loss).backward()
    for name, parameter in model.named_parameters():
        norm = parameter.grad.double().norm()
        assert norm.item() == pytest.approx(float(expected[f"grad_norm/{name}"]), rel=1e-3), name


class StubPeer:
    def __init__(self, losses):
        self._answers = [losses, 9.0]

    def receive(self):
        return self._answers.pop(0)

    def seconds(self, steps: int) -> float:
        return 2.0 * steps

    def close(self):
        pass


def test_alternating_rounds(monkeypatch):
    """The ratio is in images per second, JAX over PyTorch; different losses are an error."""
    from tools.benchmarks import bench_peer

    class StubStep:
        def save(self, work):
            (work / "bench.json").write_text(json.dumps({}))

        def compile(self):
            self.compile_seconds = 1.0

        def losses(self):
            return [2.0, 1.9]

        def run(self, steps):
            return [0.5] * steps

    monkeypatch.setattr(bench_peer, "Peer", lambda kind, work: StubPeer([2.0, 1.9]))
    seconds, results = bench_peer.alternate(StubStep(), "torch", 3, 4)
    assert seconds == [0.5] * 12
    assert results["ratio_vs_peer"] == 4.0 and results["peer_ms"] == 2000
    monkeypatch.setattr(bench_peer, "Peer", lambda kind, work: StubPeer([2.0, 1.8]))
    with pytest.raises(bench_peer.UserError, match="losses.*1.8"):
        bench_peer.alternate(StubStep(), "torch", 3, 4)


def test_chips_by_device_kind():
    from dgpt_jax.planning import chips

    kinds = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100",
    }  # fmt: skip
    assert {kind: chips.of(kind).name for kind in kinds} == kinds
    assert chips.of("cpu") is None
