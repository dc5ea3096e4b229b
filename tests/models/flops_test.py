"""Counted FLOPs compared with those of a compiled, unrolled step."""

import jax
import jax.numpy as jnp
import pytest

from dgpt_jax.config import ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.models import digpt, flops, vit
from tests.support.data import tiny_model


@pytest.mark.parametrize("decoders", [("next", "visible"), ("next", "direct")])
def test_flops_are_those_of_an_unrolled_compile(monkeypatch, decoders):
    model = tiny_model(
        image_size=64, patch=8, width=384, heads=3, depth=3, taps=(1, 3), decoder_width=256,
        decoder_heads=2,
    )  # fmt: skip
    scan = vit.nn.scan
    monkeypatch.setattr(
        vit.nn, "scan", lambda *args, **options: scan(*args, **options | {"unroll": 8})
    )
    module = digpt.build(model, out_width=96, decoders=decoders)
    inputs = digpt.dummy_inputs(model)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def loss(params, images, orders):
        predictions = module.apply({"params": params}, images, orders)
        return sum(jnp.square(p).sum() for p in predictions.values())

    def compiled(function) -> float:
        return jax.jit(function).lower(params, *inputs).compile().cost_analysis()["flops"]

    counted = sum(flops.forward_flops(model, out_width=96, decoders=decoders).values())
    images = len(inputs[0])
    assert compiled(loss) / images == pytest.approx(counted, rel=0.05)
    assert compiled(jax.grad(loss)) / images == pytest.approx(3 * counted, rel=0.05)


def test_flops_of_the_papers_model():
    """An encoder block of B/16, 148 tokens: XLA counts 0.419 TFLOP for 64 images on v5e, backward
    included, of which the elementwise operations are a hundredth."""
    counted = flops.forward_flops(parse(ModelConfig, {}), out_width=1024)
    assert set(counted) == {"patches", "encoder", "next", "visible"}
    assert 3 * 64 * counted["encoder"] / 12 == pytest.approx(0.419e12, rel=0.015)
