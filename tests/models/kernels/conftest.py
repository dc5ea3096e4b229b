"""Fixtures that trace as on an accelerator, with interpreted kernels."""

from functools import partial

import pytest

from dgpt_jax.distributed import sharding
from dgpt_jax.models.kernels import attention_gpu, kernel_check, layer_norm_gpu


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Under a mesh, the model is traced as for GPUs, and kernels are interpreted."""
    real = sharding.platform
    monkeypatch.setattr(sharding, "platform", lambda: real() and "gpu")
    monkeypatch.setattr(attention_gpu, "fused", partial(attention_gpu.fused, interpret=True))
    monkeypatch.setattr(
        layer_norm_gpu, "backward", partial(layer_norm_gpu.backward, interpret=True)
    )
    monkeypatch.setattr(layer_norm_gpu, "PROGRAMS", 2)


@pytest.fixture
def small_check(as_on_a_gpu, monkeypatch):
    """kernel_check at sizes that an interpreter runs in seconds, on a GPU."""
    for name, value in {"BATCH": 1, "WIDTH": 64, "TOKENS": 4, "REPEATS": 2}.items():
        monkeypatch.setattr(kernel_check, name, value)
