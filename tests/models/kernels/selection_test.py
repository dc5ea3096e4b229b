"""config.kernels: the implementation of attention and LayerNorm, on emulated platforms."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dgpt_jax import evaluate, train
from dgpt_jax.commands import build_tokens
from dgpt_jax.config import EvaluateConfig, MeshConfig, TokensConfig, TrainConfig
from dgpt_jax.distributed import compilation_cache, multihost, preemption, sharding
from dgpt_jax.errors import UserError
from dgpt_jax.models import attention, transformer
from dgpt_jax.models.kernels import (
    attention_gpu,
    attention_tpu,
    kernel_check,
    layer_norm_gpu,
    selection,
)
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def fresh_selection():
    kernel_check._failure.cache_clear()
    with selection.using("ours"):
        yield
    kernel_check._failure.cache_clear()


def on_platform(monkeypatch, platform):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)


@pytest.mark.parametrize(
    "implementation,platform,dtype,tokens,expected",
    [
        ("ours", "gpu", "bfloat16", 8, "gpu kernel"),
        ("ours", "gpu", "float32", 8, "xla"),
        ("ours", "tpu", "bfloat16", 8, "tpu kernel"),
        ("ours", "tpu", "float32", 8, "tpu kernel"),
        ("ours", "tpu", "float32", 641, "xla"),
        ("ours", "gpu", "bfloat16", 641, "xla"),
        ("ours", "cpu", "bfloat16", 8, "xla"),
        ("ours", None, "bfloat16", 8, "xla"),
        ("xla", "gpu", "bfloat16", 8, "xla"),
        ("xla", "tpu", "bfloat16", 8, "xla"),
        ("cudnn", "gpu", "bfloat16", 8, "cudnn"),
        ("cudnn", "gpu", "bfloat16", 642, "cudnn"),
        ("cudnn", "gpu", "float32", 8, "xla"),
    ],
)
def test_attention_of_each_choice(monkeypatch, implementation, platform, dtype, tokens, expected):
    calls = []

    def library(q, k, v, mask, implementation):
        calls.append(implementation)
        return q

    def kernel(name):
        def fused(projections, *args, **options):
            calls.append(name)
            return projections[0][0]

        return fused

    on_platform(monkeypatch, platform)
    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    monkeypatch.setattr(attention_gpu, "fused", kernel("gpu kernel"))
    monkeypatch.setattr(attention_tpu, "fused", kernel("tpu kernel"))
    monkeypatch.setattr(sharding, "shard_map_heads", lambda f, *args: f(*args[:2]))
    qkv = jnp.zeros((3, 1, tokens, 16), dtype)
    with selection.using(implementation):
        attention.attend((qkv,), 8, np.ones((tokens, tokens), bool))
    assert calls == [expected]


@pytest.mark.parametrize("implementation,calls", [("ours", 1), ("xla", 0), ("cudnn", 0)])
def test_layer_norm_of_each_choice(monkeypatch, implementation, calls):
    on_platform(monkeypatch, "gpu")
    text = traced_gradient(lambda x: transformer.layer_norm(x, x[0, 0], x[0, 0], 1e-6, x.dtype),
                           (2, 4, 16), implementation, "float32")  # fmt: skip
    assert text.count("pallas_call") == calls


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("implementation", ["ours", "xla"])
def test_xla_traces_no_kernel(monkeypatch, platform, implementation):
    on_platform(monkeypatch, platform)
    block = transformer.Block(2, dtype=jnp.bfloat16)
    with selection.using("xla"):
        params = jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((2, 4, 16)))

    def apply(x):
        return block.apply(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params), x)

    text = traced_gradient(apply, (2, 4, 16), implementation, "float32")
    assert ("pallas_call" in text) == (implementation == "ours")


def traced_gradient(function, shape, implementation, dtype) -> str:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    gradient = jax.grad(lambda x: function(x).astype(jnp.float32).sum())
    with selection.using(implementation):
        return str(jax.make_jaxpr(sharding.on_mesh(gradient, mesh))(jnp.ones(shape, dtype)))


def test_cudnn_takes_no_mask_over_an_odd_number_of_tokens(monkeypatch):
    on_platform(monkeypatch, "gpu")
    qkv = jnp.zeros((3, 1, 193, 16), jnp.bfloat16)
    with selection.using("cudnn"), pytest.raises(UserError, match=r"config\.kernels=cudnn.*193"):
        attention.attend((qkv,), 8, np.ones((193, 193), bool))


@pytest.mark.parametrize(
    "kernels,platform,expected",
    [
        ("auto", "cpu", "ours"),
        ("xla", "cpu", "xla"),
        ("xla", "tpu", "xla"),
        ("ours", "tpu", "ours"),
        ("ours", "gpu", "ours"),
        ("cudnn", "gpu", "cudnn"),
        ("ours", "cpu", UserError),
        ("cudnn", "cpu", UserError),
        ("cudnn", "tpu", UserError),
    ],
)
def test_selection_without_a_check(monkeypatch, kernels, platform, expected):
    def fail():
        raise AssertionError("no check is due")

    on_platform(monkeypatch, platform)
    monkeypatch.setattr(kernel_check, "deviations", fail)
    lines = []
    if expected is UserError:
        with pytest.raises(UserError, match=rf"config\.kernels={kernels}.*{platform}"):
            kernel_check.select(kernels, lines.append)
        assert selection.implementation() == "ours"
    else:
        kernel_check.select(kernels, lines.append)
        assert selection.implementation() == expected
    assert not lines


def select_on_gpu(monkeypatch) -> list[str]:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lines = []
    kernel_check.select("auto", lines.append)
    return lines


def test_auto_selects_right_kernels_after_one_check(small_check, monkeypatch):
    checks, deviations = [], kernel_check.deviations
    monkeypatch.setattr(kernel_check, "deviations", lambda: checks.append("check") or deviations())
    assert select_on_gpu(monkeypatch) == select_on_gpu(monkeypatch) == []
    assert selection.implementation() == "ours" and len(checks) == 1


def test_auto_falls_back_to_xla_for_a_wrong_kernel(small_check, monkeypatch):
    monkeypatch.setattr(attention_gpu, "LOG2E", 1.5)
    lines = select_on_gpu(monkeypatch)
    assert selection.implementation() == "xla" and len(lines) == 1
    for word in ("self-attention", "cross-attention", jax.devices()[0].device_kind):
        assert word in lines[0]
    assert "LayerNorm" not in lines[0] and "e-0" in lines[0]


def test_auto_falls_back_to_xla_for_a_wrong_layer_norm(small_check, monkeypatch):
    backward = layer_norm_gpu.backward
    monkeypatch.setattr(
        layer_norm_gpu, "backward", lambda *args: tuple(jnp.nan * x for x in backward(*args))
    )
    lines = select_on_gpu(monkeypatch)
    assert selection.implementation() == "xla" and len(lines) == 1
    assert "LayerNorm" in lines[0] and "nan" in lines[0]


def test_auto_falls_back_to_xla_for_a_kernel_that_does_not_compile(monkeypatch):
    def deviations():
        raise NotImplementedError("no Triton for this GPU\nand a stack of calls")

    monkeypatch.setattr(kernel_check, "deviations", deviations)
    lines = select_on_gpu(monkeypatch)
    assert selection.implementation() == "xla"
    assert len(lines) == 1 and "no Triton" in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("process,lines", [(0, 1), (1, 0)])
def test_a_failure_of_one_process_is_one_of_all(monkeypatch, process, lines):
    """Both processes pass; a third, whose result they gather, does not."""
    gathered = np.array([False, False, True])
    monkeypatch.setattr(kernel_check, "deviations", list)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda failed: gathered | failed)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    messages = select_on_gpu(monkeypatch)
    assert selection.implementation() == "xla" and len(messages) == lines
    assert all("process 2" in message for message in messages)


@pytest.mark.parametrize("config", [TrainConfig, TokensConfig, EvaluateConfig])
def test_other_values_are_refused(config):
    with pytest.raises(UserError, match=r"config\.kernels.*cuda"):
        config(kernels="cuda").resolved()


COMMANDS = {
    train: ["--config=configs/quickstart.py", "--workdir=run", "--config.data.path=x"],
    evaluate: ["--config=configs/knn_in1k.py", "--checkpoint=x", "--config.data=x"],
    build_tokens: ["--config=configs/quickstart_tokens.py", "--out=store", "--config.source=x"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_select_after_joining_the_other_processes(command, monkeypatch, tmp_path):
    class Selected(Exception):
        pass

    def select(kernels, say):
        events.append(kernels)
        raise Selected

    events = []
    monkeypatch.setattr(kernel_check, "select", select)
    monkeypatch.setattr(multihost, "start", lambda *args: events.append("joined"))
    monkeypatch.setattr(preemption, "raise_on_sigterm", lambda: None)
    monkeypatch.setattr(compilation_cache, "use", lambda workdir: None)
    words = [str(word).replace("=configs", f"={ROOT}/configs") for word in COMMANDS[command]]
    monkeypatch.setattr(sys, "argv", ["command", *words, "--config.kernels=xla"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Selected):
        command.main()
    assert events == ["joined", "xla"]
