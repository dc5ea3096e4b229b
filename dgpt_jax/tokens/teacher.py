"""Teacher inference outside of training, on the devices of this process."""

from collections.abc import Callable

import jax
import numpy as np

from dgpt_jax.config import roots
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.distributed import sharding
from dgpt_jax.models import teacher_vit
from dgpt_jax.weights import teacher_loading as teacher_weights


class Teacher:
    """A teacher on this process's devices: images to tokens.

    Every process has its own copy, so that none waits for another. All batches have `batch_size`
    images per device: with another shape, XLA may sum in another order.
    """

    def __init__(self, settings: roots.TeacherConfig, batch_size: int, tensor: int = 1):
        """batch_size: images per device. tensor: devices over which the weights are sharded."""
        loaded = teacher_weights.load_configured(settings)
        self.tower, self.name, self.hash = loaded.tower, loaded.name, loaded.hash
        self.notes, self.dtype = loaded.notes, settings.dtype
        self.mesh = sharding.make_mesh(roots.MeshConfig(tensor=tensor), jax.local_devices())
        self.batch_size = batch_size * self.mesh.shape["data"]
        # Kernels in the dtype of the matmuls, which would cast them anyway: half the memory.
        params = jax.tree_util.tree_map_with_path(self._cast, loaded.params)
        self.params = jax.device_put(params, sharding.shard_state(self.mesh, params))
        self._exact_tokens = self._jit(lambda tokens: tokens)

    def _cast(self, path: tuple, leaf: jax.Array) -> jax.Array:
        kernel = jax.tree_util.keystr(path).endswith("['kernel']")
        return leaf.astype(jax.numpy.dtype(self.dtype)) if kernel else leaf

    def _jit(self, encode: Callable[[jax.Array], jax.Array]) -> Callable:
        def run(params, images):
            tokens = teacher_vit.teacher_tokens(self.tower, params, images, dtype=self.dtype)
            return encode(tokens), jax.numpy.isfinite(tokens).all()

        return jax.jit(sharding.on_mesh(run, self.mesh))

    def encoder(self, codec: Codec) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
        """Returns a function that starts a batch: uint8 (b ≤ batch_size, height, width, 3) to
        (stored tokens of batch_size images, True if all are finite), both in transfer to the
        host."""
        encode = self._jit(codec.encode)

        def start(images: np.ndarray) -> tuple[jax.Array, jax.Array]:
            results = encode(self.params, self._pad_to_device(images))
            for result in results:
                result.copy_to_host_async()
            return results

        return start

    def _pad_to_device(self, images: np.ndarray) -> jax.Array:
        """Pads a batch to batch_size and transfers it to the devices."""
        missing = self.batch_size - len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        return jax.device_put(padded, sharding.batch_sharding(self.mesh))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 tokens (n, tokens, C) of images, uint8 (n, height, width, 3)."""
        tokens = []
        for i in range(0, len(images), self.batch_size):
            batch = images[i : i + self.batch_size]
            padded, _ = self._exact_tokens(self.params, self._pad_to_device(batch))
            tokens.append(np.asarray(padded)[: len(batch)])
        return np.concatenate(tokens)

    def describe(self) -> dict:
        """Returns the metadata that a token store records."""
        return {
            "name": self.name,
            "hash": self.hash,
            "dtype": self.dtype,
            "width": self.tower.token_width,
            "tower": self.tower.describe(),
        }
