"""Token stores: TFDS directories with one split per view (`view000`, …) and `token_store.json`.

An example is {id, image (the rendered crop), tokens (packed by token_codec), box, flip, and label
if the source has labels}. The JSON, StoreInfo, records how the store was built; it is written
before the first shard, TFDS's own metadata after the last.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax.config import check_choice, renamed_keys
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_codec
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import atomic, gcs

STORE_FILE = "token_store.json"
BASIS_FILE = "basis.npy"
FORMAT = 2


@dataclass(frozen=True)
class StoreInfo:
    """Metadata of a token store; compared with the training config at start.

    name: prefix of its file names. codec: one of token_codec.CODECS. grid: the teacher's (rows,
    columns). cls: True if its CLS token comes first. width: stored channels, the teacher's C, or C′
    after PCA. channel_scale: one per channel, empty for float16. cosine: measured (minimum, mean)
    of decoded to exact tokens. variance: fraction kept by PCA; 1 without. example_bytes: mean size
    of a stored example, measured on the sample. command: builds the store, and resumes it.
    """

    name: str
    codec: str
    grid: tuple[int, int]
    cls: bool
    width: int
    channel_scale: tuple[float, ...]
    cosine: tuple[float, float]
    variance: float
    example_bytes: float
    image_size: int
    image_encoding: str
    teacher: dict
    source: dict
    views: dict
    command: str
    code_version: str
    format: int = FORMAT

    @property
    def tokens(self) -> int:
        """Number of stored tokens per example."""
        return self.grid[0] * self.grid[1] + self.cls

    @property
    def is_reduced(self) -> bool:
        """True if tokens were projected by PCA."""
        return self.width != self.teacher["width"]

    def save(self, directory: epath.PathLike):
        """Writes the JSON atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        atomic.write_text(epath.Path(directory) / STORE_FILE, text)

    @classmethod
    def load(cls, directory: epath.PathLike) -> "StoreInfo":
        """Reads the JSON. Raises UserError if it is missing, damaged or of another format."""
        path = epath.Path(directory) / STORE_FILE
        if not path.exists():
            raise UserError(f"{directory} is not a token store: {STORE_FILE} is missing")
        try:
            values = json.loads(path.read_text())
            format = values["format"]
            if format == FORMAT:
                info = parse(cls, renamed_keys.translate(values), str(path))
                check_choice(f"{path}: codec", info.codec, token_codec.CODECS)
                return info
        except UserError as e:
            raise UserError(f"{path} is damaged, or written by a newer version: {e}") from None
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} is damaged: {type(e).__name__}: {one_line(e)}") from None
        raise UserError(
            f"{path} has format {format}, this code reads format {FORMAT}: build the store again"
        )

    def load_codec(self, directory: epath.PathLike) -> Codec:
        """Returns the codec, with its PCA basis if the store has one. Raises UserError."""
        basis = None
        if self.is_reduced:
            basis = _load_basis(epath.Path(directory) / BASIS_FILE)
            if basis.shape != (self.teacher["width"], self.width):
                raise UserError(
                    f"{directory}/{BASIS_FILE} has shape {basis.shape}, but by {STORE_FILE} "
                    f"{(self.teacher['width'], self.width)}"
                )
        return Codec(self.codec, np.asarray(self.channel_scale, np.float32), basis)


def _load_basis(path: epath.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is not a readable array: {one_line(e)}") from None


def copy_basis(store: epath.PathLike, out: epath.PathLike):
    """Copies the PCA basis of a store into the directory of another. Raises UserError."""
    path = epath.Path(store) / BASIS_FILE
    with gcs.failures(f"{path} cannot be read"):
        data = path.read_bytes()
    atomic.write_bytes(epath.Path(out) / BASIS_FILE, data)


def exists(directory: epath.PathLike) -> bool:
    """True if a directory has the metadata of a token store."""
    return (epath.Path(directory) / STORE_FILE).exists()


def view_split(view: int) -> str:
    """Returns the split name of a view."""
    return f"view{view:03d}"


def features(info: StoreInfo, label: tfds.features.ClassLabel | None) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a token store; `label` is the source's ClassLabel or None."""
    size = info.image_size
    schema = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(size, size, 3)),
        # Bytes, not a list of integers: a sixth of the size and 40 times as fast to parse.
        "tokens": tfds.features.Tensor(
            shape=(info.tokens, token_codec.stored_width(info.codec, info.width)),
            dtype=token_codec.CODECS[info.codec],
            encoding=tfds.features.Encoding.BYTES,
        ),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "flip": tfds.features.Scalar(dtype=np.int32),
    }
    return tfds.features.FeaturesDict(schema if label is None else schema | {"label": label})


def check_features(directory: epath.PathLike, stored: Any):
    """Raises UserError if a store's TFDS features, a FeaturesDict, contradict its StoreInfo."""
    info = StoreInfo.load(directory)
    expected = features(info, None)
    for name in ("image", "tokens"):
        actual = _shape_and_dtype(stored[name]) if name in stored else "absent"
        if actual != _shape_and_dtype(expected[name]):
            raise UserError(
                f"{directory} is damaged: by {STORE_FILE} its {name} are "
                f"{_shape_and_dtype(expected[name])}, by features.json {actual}"
            )
    if len(info.channel_scale) != (0 if info.codec == "float16" else info.width):
        raise UserError(
            f"{directory}/{STORE_FILE} is damaged: {len(info.channel_scale)} scales for "
            f"{info.width} channels"
        )


def _shape_and_dtype(feature: tfds.features.FeatureConnector) -> str:
    dtype = np.dtype(feature.np_dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return f"{feature.shape} {dtype}"  # TFDS annotates dtypes of nested features


def require_finished(directory: epath.PathLike):
    """Raises UserError, with the command that resumes it, if a store's build is unfinished."""
    path = epath.Path(directory)
    if exists(path) and not (path / "dataset_info.json").exists():
        info = StoreInfo.load(path)
        raise UserError(f"{directory} is unfinished; finish it with: {info.command}")
