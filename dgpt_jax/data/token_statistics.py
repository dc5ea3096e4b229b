"""Mean and covariance of a teacher's tokens, and targets that are centered or whitened by them.

Measured when a store is finished, over all tokens, CLS included, of a sample of its first view, as
training decodes them. `statistics.npz` lies beside the teacher's metadata.
"""

import io
import zipfile
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import atomic, tfds_dataset
from dgpt_jax.storage.gcs import AnyPath

FILE = "statistics.npz"
SAMPLE = 256  # examples on which codecs, cosines and statistics are measured
FLOOR = 1e-3  # of the mean variance: directions that the sample hardly has are not blown up


@dataclass(frozen=True)
class TokenStatistics:
    """mean (C,), variance (C,) per channel, axes (C, C) in columns and their variances (C,)."""

    mean: np.ndarray
    variance: np.ndarray
    axes: np.ndarray
    axis_variance: np.ndarray

    def normalize(self, tokens: jax.Array, kind: str) -> jax.Array:
        """Returns tokens (…, C) float32: "none" unchanged; "center" minus the mean; "whiten" also
        over the standard deviation of each channel; "pca_whiten" over that of each principal axis,
        in the coordinates of the axes."""
        if kind == "none":
            return tokens
        centered = tokens - jnp.asarray(self.mean)
        if kind == "center":
            return centered
        if kind == "whiten":
            return centered * jnp.asarray(_inverse_std(self.variance))
        scaled = jnp.asarray(self.axes * _inverse_std(self.axis_variance))
        return jnp.einsum("...c,cd->...d", centered, scaled, precision="highest")


def _inverse_std(variance: np.ndarray) -> np.ndarray:
    floor = FLOOR * variance.mean() + np.finfo(np.float32).tiny
    return (1 / np.sqrt(np.maximum(variance, floor))).astype(np.float32)


def sample_of(examples: int) -> range:
    """Returns the indices of at most SAMPLE examples, evenly spaced."""
    return range(0, examples, max(1, examples // SAMPLE))[:SAMPLE]


def measure(tokens: np.ndarray) -> TokenStatistics:
    """Returns the statistics of tokens (…, C)."""
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    mean = rows.mean(axis=0)
    covariance = np.cov(rows, rowvar=False, bias=True).reshape(len(mean), len(mean))
    axis_variance, axes = np.linalg.eigh(covariance)
    axis_variance, axes = np.maximum(axis_variance[::-1], 0), axes[:, ::-1]
    axes = axes * np.where(np.abs(axes).max(axis=0) == axes.max(axis=0), 1, -1)  # signs are free
    arrays = (mean, covariance.diagonal(), axes, axis_variance)
    return TokenStatistics(*(np.ascontiguousarray(x, np.float32) for x in arrays))


def measure_store(directory: AnyPath, view: str, codec: Codec) -> None:
    """Writes the statistics of a finished directory of tokens, atomically, unless it has them.

    A function of the stored tokens alone. view: split of the sample. Raises UserError.
    """
    if (epath.Path(directory) / FILE).exists():
        return
    split = tfds_dataset.Split(directory, view)
    tokens = codec.decode(np.stack([split[row]["tokens"] for row in sample_of(len(split))]))
    split.close()
    buffer = io.BytesIO()
    np.savez(buffer, **vars(measure(np.asarray(tokens))))
    atomic.write_bytes(epath.Path(directory) / FILE, buffer.getvalue())


def load(directory: AnyPath, width: int, command: str) -> TokenStatistics:
    """Reads the file of tokens of `width` channels. Raises UserError if it is missing, with the
    command that measures them, or damaged."""
    path = epath.Path(directory) / FILE
    if not path.exists():
        raise UserError(
            f"{directory} lacks {FILE}, by which targets are centered or whitened: it was built by "
            f"an earlier version; the command that built it measures them: {command}"
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            statistics = TokenStatistics(**{name: arrays[name] for name in arrays.files})
        shapes = [x.shape for x in vars(statistics).values()]
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is damaged: {one_line(e)}") from None
    if shapes != [(width,), (width,), (width, width), (width,)]:
        raise UserError(f"{path} is damaged: shapes {shapes} of tokens of width {width}")
    return statistics
