"""What a token store says of one teacher: its weights, its tokens and how they are encoded."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.config import check_choice
from dgpt_jax.data import token_codec
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import atomic, gcs

BASIS_FILE = "basis.npy"


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher of a token store.

    name: by which configs call it. weights: name, hash, dtype, width C and tower of the weights.
    codec: one of token_codec.CODECS. grid: (rows, columns) of its tokens. cls: True if its CLS
    token comes first. width: stored channels, C, or C′ after PCA. channel_scale: one per channel,
    empty for float16. cosine: measured (minimum, mean) of decoded to exact tokens. variance:
    fraction kept by PCA; 1 without.
    """

    name: str
    weights: dict
    codec: str
    grid: tuple[int, int]
    cls: bool
    width: int
    channel_scale: tuple[float, ...]
    cosine: tuple[float, float]
    variance: float

    def resolved(self) -> "TeacherInfo":
        """Returns the teacher itself. Raises UserError if its codec is unknown."""
        check_choice("codec", self.codec, token_codec.CODECS)
        return self

    @property
    def tokens(self) -> int:
        """Number of stored tokens per example."""
        return self.grid[0] * self.grid[1] + self.cls

    @property
    def is_reduced(self) -> bool:
        """True if tokens were projected by PCA."""
        return self.width != self.weights["width"]

    def load_codec(self, directory: epath.PathLike) -> Codec:
        """Returns the codec, with the PCA basis in `directory` if there is one. Raises
        UserError."""
        basis = None
        if self.is_reduced:
            basis = _load_basis(epath.Path(directory) / BASIS_FILE)
            expected = (self.weights["width"], self.width)
            if basis.shape != expected:
                raise UserError(
                    f"{directory}/{BASIS_FILE} has shape {basis.shape}, but by the metadata of "
                    f"the store {expected}"
                )
        return Codec(self.codec, np.asarray(self.channel_scale, np.float32), basis)

    def feature(self) -> tfds.features.Tensor:
        """Returns the TFDS feature of the stored tokens."""
        # Bytes, not a list of integers: a sixth of the size and 40 times as fast to parse.
        return tfds.features.Tensor(
            shape=(self.tokens, token_codec.stored_width(self.codec, self.width)),
            dtype=token_codec.CODECS[self.codec],
            encoding=tfds.features.Encoding.BYTES,
        )

    def require_scales(self, file: epath.PathLike) -> None:
        """Raises UserError unless there is a scale per channel, or none for float16."""
        if len(self.channel_scale) != (0 if self.codec == "float16" else self.width):
            raise UserError(
                f"{file} is damaged: {len(self.channel_scale)} scales for {self.width} channels"
            )


def as_json(value: Any) -> Any:
    """Returns a value as it is after a JSON round trip."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _load_basis(path: epath.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is not a readable array: {one_line(e)}") from None


def save_basis(directory: epath.PathLike, basis: np.ndarray) -> None:
    """Writes a PCA basis (C, C′) into a directory."""
    with (epath.Path(directory) / BASIS_FILE).open("wb") as file:
        np.save(file, basis)


def copy_basis(store: epath.PathLike, out: epath.PathLike) -> None:
    """Copies the PCA basis of a store into the directory of another. Raises UserError."""
    path = epath.Path(store) / BASIS_FILE
    with gcs.failures(f"{path} cannot be read"):
        data = path.read_bytes()
    atomic.write_bytes(epath.Path(out) / BASIS_FILE, data)
