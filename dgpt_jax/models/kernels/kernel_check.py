"""Checks our kernels against XLA on this machine's accelerator, and selects an implementation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dgpt_jax.config import MeshConfig
from dgpt_jax.data import segments
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.models import attention, transformer
from dgpt_jax.models.kernels import selection

BOUND = 1e-2  # ‖result − exact‖ / ‖exact‖ in bfloat16; on an H200 2.4e-3
BATCH, WIDTH, TOKENS = 8, 768, 49  # of B/16; tokens per segment
REPEATS = 4  # that must agree bit for bit: a difference is a race
PLATFORMS = {"ours": ("gpu", "tpu"), "cudnn": ("gpu",)}  # that have an implementation


def select(kernels: str, say: Callable[[str], None]) -> None:
    """Chooses the implementation of attention and LayerNorm from `config.kernels`.

    Every process calls it, after multihost.start and before tracing. "auto" checks our kernels on
    the device, for a few seconds, and chooses XLA on all processes where one of them fails; process
    0 says so. Raises UserError where this platform lacks the requested implementation.
    """
    platform = jax.default_backend()
    if platform not in PLATFORMS.get(kernels, (platform,)):
        needed = " or a ".join(name.upper() for name in PLATFORMS[kernels])
        raise UserError(
            f"config.kernels={kernels} needs a {needed}, JAX runs on {platform}: use auto or xla"
        )
    if kernels == "auto":
        kernels = "ours"
        if platform in PLATFORMS["ours"] and (failure := _failure()):
            kernels = "xla"
            if jax.process_index() == 0:
                say(f"config.kernels=auto uses XLA: {failure}")
    selection.choose(kernels)


@functools.cache  # once per process
def _failure() -> str:
    """Returns the failed checks in one clause, "" if all processes passed."""
    try:
        failures = [str(deviation) for deviation in deviations() if not deviation.ok]
    except Exception as e:  # of any compiler: the other processes wait for the result
        failures = [one_line(e)]
    failed = np.ravel(multihost_utils.process_allgather(np.array(bool(failures))))
    if failures:
        return f"{', '.join(failures)}, on {jax.local_devices()[0].device_kind}"
    return f"process {np.argmax(failed)} found a wrong kernel" if failed.any() else ""


@dataclass(frozen=True)
class Deviation:
    """A kernel compared with XLA: the largest relative error of its outputs and gradients, and
    whether repeated runs agree bit for bit."""

    kernel: str
    error: float
    deterministic: bool

    @property
    def ok(self) -> bool:
        return self.deterministic and self.error < BOUND

    def __str__(self) -> str:
        text = f"{self.kernel} kernel has relative error {self.error:.1e} to XLA in float32"
        return text if self.deterministic else f"{text} and differs between runs"


def deviations() -> list[Deviation]:
    """Runs attention.attend and LayerNorm with their gradients, in bfloat16, on one local device.

    The reference is XLA's result for the same inputs in float32.
    """
    mesh, rows = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1]), []
    for name, (compute, compute_exact, inputs) in _computations().items():
        inputs = jax.device_put(inputs, sharding.replicated(mesh))
        compute = jax.jit(sharding.on_mesh(compute, mesh))
        with selection.using("ours"):
            first, *others = [jax.device_get(compute(*inputs)) for _ in range(REPEATS)]
        with jax.default_matmul_precision("highest"):
            exact = jax.device_get(jax.jit(compute_exact)(*_in_float32(inputs)))
        errors = [_relative_error(a, b) for a, b in zip(first, exact, strict=True)]
        same = all(np.array_equal(a, b) for other in others for a, b in zip(first, other))
        rows.append(Deviation(name, float(np.max(errors)), same))
    return rows


def _computations() -> dict:
    """{name: (function of inputs through our kernels, the same through XLA, inputs)}."""
    mask = segments.attention_mask(3, TOKENS)
    key = jax.random.key(0)

    def normal(i, *shape):
        return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)

    def attend(head_width):
        options = {"head_width": head_width, "mask_NM": mask}
        functions = (attention.attend, attention.reference)
        return [partial(_with_gradients, partial(function, **options)) for function in functions]

    shape = (BATCH, len(mask), WIDTH)
    encoder = ((normal(0, 3, *shape),), normal(1, *shape))
    decoder = ((normal(2, 1, *shape), normal(3, 2, *shape)), normal(4, *shape))
    x, scale = 3 * normal(5, *shape) + 1, 1 + 0.1 * normal(6, WIDTH)
    norm = (*_in_float32((x, scale)), jnp.zeros(WIDTH)), normal(7, *shape)
    return {
        "self-attention": (*attend(64), encoder),
        "cross-attention": (*attend(32), decoder),
        "LayerNorm": (_norm(jnp.bfloat16), _norm(jnp.float32), norm),
    }


def _norm(dtype):
    return partial(_with_gradients, lambda inputs: transformer.layer_norm(*inputs, 1e-6, dtype))


def _with_gradients(function, inputs, d_out):
    """Returns the function's output and the gradients of its inputs."""
    out, vjp = jax.vjp(function, inputs)
    return out, *vjp(d_out)[0]


def _in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
