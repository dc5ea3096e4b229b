"""The teacher at work outside of training: its weights on the devices of this process alone."""

import dataclasses

import jax
import numpy as np

from dgpt_jax import config, sharding, towers
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.token_codec import Codec


class Teacher:
    """A teacher's tower on this process's devices: pictures in, tokens out.

    Every process has its own copy, so that none waits for another. A batch is `batch_size` pictures
    a device, always: with another number the compiler may add in another order.
    """

    def __init__(self, settings: config.Teacher, batch_size: int, tensor: int = 1):
        """batch_size: pictures a device. tensor: devices over which the weights are split."""
        loaded = teacher_weights.load_configured(settings)
        self.tower, self.name, self.hash = loaded.tower, loaded.name, loaded.hash
        self.notes, self.dtype = loaded.notes, settings.dtype
        self.mesh = sharding.make_mesh(config.Mesh(tensor=tensor), jax.local_devices())
        self.batch_size = batch_size * self.mesh.shape["data"]
        # Kernels in the dtype of the matmuls, which would cast them anyway: half the memory.
        params = jax.tree_util.tree_map_with_path(self._cast, loaded.params)
        self.params = jax.device_put(params, sharding.shard_state(self.mesh, params))
        self._tokens_of = self._jit(lambda tokens: tokens)

    def _cast(self, path, leaf):
        kernel = jax.tree_util.keystr(path).endswith("['kernel']")
        return leaf.astype(jax.numpy.dtype(self.dtype)) if kernel else leaf

    def _jit(self, then):
        def run(params, pictures):
            tokens = towers.teacher_tokens(self.tower, params, pictures, dtype=self.dtype)
            return then(tokens), jax.numpy.isfinite(tokens).all()

        return jax.jit(sharding.on_mesh(run, self.mesh))

    def encoder(self, codec: Codec):
        """A function that starts a batch: uint8 (b ≤ batch_size, height, width, 3) to (stored
        tokens of batch_size pictures, whether all are finite), both on their way to the host."""
        encode = self._jit(codec.encode)

        def start(pictures: np.ndarray):
            results = encode(self.params, self._place(pictures))
            for result in results:
                result.copy_to_host_async()
            return results

        return start

    def _place(self, pictures: np.ndarray):
        """The batch on the devices, its tail padded."""
        missing = self.batch_size - len(pictures)
        padded = np.concatenate([pictures, np.repeat(pictures[-1:], missing, axis=0)])
        return jax.device_put(padded, sharding.batch_sharding(self.mesh))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 3) to float32 (n, tokens, C), a batch at a time."""
        tokens = []
        for i in range(0, len(pictures), self.batch_size):
            batch = pictures[i : i + self.batch_size]
            found, _ = self._tokens_of(self.params, self._place(batch))
            tokens.append(np.asarray(found)[: len(batch)])
        return np.concatenate(tokens)

    def describe(self) -> dict:
        """What a token store says of it."""
        tower = dataclasses.asdict(self.tower)
        return {
            "name": self.name,
            "hash": self.hash,
            "dtype": self.dtype,
            "width": self.tower.token_width,
            "tower": tower,
        }
