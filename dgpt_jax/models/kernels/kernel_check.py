"""Whether this machine's accelerator computes what XLA does, by the kernels that are ours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import attention, segments, sharding, transformer
from dgpt_jax.config import Mesh
from dgpt_jax.doctor import Finding

BOUND = 1e-2  # ‖found − exact‖ / ‖exact‖ in bfloat16; on an H200 2.4e-3
BATCH, WIDTH, TOKENS = 8, 768, 49  # of B/16; tokens of a segment
REPEATS = 4  # that must give the same bits: what changes is a race


def kernels() -> list[Finding]:
    """attention.attend and LayerNorm with their gradients, in bfloat16, on one device."""
    mesh, found = sharding.make_mesh(Mesh(), jax.local_devices()[:1]), []
    for name, (compute, exactly, inputs) in _computations().items():
        inputs = jax.device_put(inputs, sharding.replicated(mesh))
        compute = jax.jit(sharding.on_mesh(compute, mesh))
        first, *others = [jax.device_get(compute(*inputs)) for _ in range(REPEATS)]
        with jax.default_matmul_precision("highest"):
            exact = jax.device_get(jax.jit(exactly)(*_in_float32(inputs)))
        errors = [_distance(a, b) for a, b in zip(first, exact, strict=True)]
        same = all(np.array_equal(a, b) for other in others for a, b in zip(first, other))
        found.append(judge(name, max(errors), same))
    return found


def judge(name: str, error: float, same: bool) -> Finding:
    """What is said of a kernel that is `error` away from what is exact."""
    text = f"kernel of {name}: {error:.1e} from XLA's in float32"
    remedy = "do not train here: tell us, with the device and the version of jax"
    if not same:
        return Finding("fail", f"{text}, and other numbers every time", remedy)
    return Finding("ok", text) if error < BOUND else Finding("fail", text, remedy)


def _computations() -> dict:
    """{name: (function of inputs by our ways, the same by XLA's, inputs)}."""
    mask = segments.attention_mask(3, TOKENS)
    key = jax.random.key(0)

    def normal(i, *shape):
        return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)

    def attend(head_width):
        how = {"head_width": head_width, "mask_NM": mask}
        functions = (attention.attend, attention.reference)
        return [partial(_with_gradient, partial(function, **how)) for function in functions]

    like = (BATCH, len(mask), WIDTH)
    encoder = ((normal(0, 3, *like),), normal(1, *like))
    decoder = ((normal(2, 1, *like), normal(3, 2, *like)), normal(4, *like))
    x, scale = 3 * normal(5, *like) + 1, 1 + 0.1 * normal(6, WIDTH)
    norm = (*_in_float32((x, scale)), jnp.zeros(WIDTH)), normal(7, *like)
    return {
        "self-attention": (*attend(64), encoder),
        "cross-attention": (*attend(32), decoder),
        "LayerNorm": (_norm(jnp.bfloat16), _norm(jnp.float32), norm),
    }


def _norm(dtype):
    return partial(_with_gradient, lambda inputs: transformer.normalised(*inputs, 1e-6, dtype))


def _with_gradient(function, inputs, gradient):
    """What the function gives, and the gradients of its inputs."""
    out, pull = jax.vjp(function, inputs)
    return out, *pull(gradient)[0]


def _in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
