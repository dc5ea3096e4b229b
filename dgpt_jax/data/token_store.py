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
from dgpt_jax.config.data import FIRST
from dgpt_jax.config.schema import parse
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import atomic

STORE_FILE = "token_store.json"
FORMAT, OLDEST = 3, 2
# Keys of format 2 that were moved, by their group in format 3.
MOVED = ("codec", "grid", "cls", "width", "channel_scale", "cosine", "variance")


@dataclass(frozen=True)
class StoredImages:
    """The images of a token store: pixels, and encoding (image_ops.ENCODINGS)."""

    height: int
    width: int
    encoding: str
    channels: int = 3
    dtype: str = "uint8"

    def resolved(self) -> "StoredImages":
        """Returns the images themselves. Raises UserError on kinds that this version lacks."""
        check_choice("channels", self.channels, (3,))
        check_choice("dtype", self.dtype, ("uint8",))
        if self.height != self.width:
            raise UserError(f"images of {self.height} x {self.width} pixels: square ones are read")
        return self


@dataclass(frozen=True)
class StoreInfo:
    """Metadata of a token store; compared with the training config at start.

    name: prefix of its file names. layout: "crop", a rendered crop per view. teacher: of the
    tokens in the records. example_bytes: mean size of a stored example, measured on the sample.
    command: builds the store, and resumes it.
    """

    name: str
    image: StoredImages
    teacher: TeacherInfo
    source: dict
    views: dict
    example_bytes: float
    command: str
    code_version: str
    layout: str = "crop"
    format: int = FORMAT

    def resolved(self) -> "StoreInfo":
        """Returns the metadata themselves. Raises UserError on layouts that this version lacks."""
        check_choice("layout", self.layout, ("crop",))
        return self

    def save(self, directory: epath.PathLike):
        """Writes the JSON atomically, in today's format."""
        values = dataclasses.asdict(self) | {"format": FORMAT}
        text = json.dumps(values, indent=1) + "\n"
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
            if format == OLDEST:
                values = _of_format_2(renamed_keys.translate(values))
            if format in (OLDEST, FORMAT):
                return parse(cls, values, str(path))
        except UserError as e:
            raise UserError(f"{path} is damaged, or written by a newer version: {e}") from None
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} is damaged: {type(e).__name__}: {one_line(e)}") from None
        raise UserError(
            f"{path} has format {format}, this code reads formats {OLDEST} and {FORMAT}: build the "
            f"store again, or use the version that wrote it"
        )


def _of_format_2(values: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a store of format 2 in today's form. `format` says what it was."""
    size, encoding = values.pop("image_size"), values.pop("image_encoding")
    teacher = {key: values.pop(key) for key in MOVED}
    teacher |= {"name": FIRST, "weights": values.pop("teacher")}
    image = {"height": size, "width": size, "encoding": encoding}
    return values | {"teacher": teacher, "image": image}


def exists(directory: epath.PathLike) -> bool:
    """True if a directory has the metadata of a token store."""
    return (epath.Path(directory) / STORE_FILE).exists()


def view_split(view: int) -> str:
    """Returns the split name of a view."""
    return f"view{view:03d}"


def features(info: StoreInfo, label: tfds.features.ClassLabel | None) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a token store; `label` is the source's ClassLabel or None."""
    schema = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(info.image.height, info.image.width, 3)),
        "tokens": info.teacher.feature(),
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
    info.teacher.require_scales(f"{directory}/{STORE_FILE}")


def _shape_and_dtype(feature: tfds.features.FeatureConnector) -> str:
    dtype = np.dtype(feature.np_dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return f"{feature.shape} {dtype}"  # TFDS annotates dtypes of nested features


def require_finished(directory: epath.PathLike):
    """Raises UserError, with the command that resumes it, if a store's build is unfinished."""
    path = epath.Path(directory)
    if exists(path) and not (path / "dataset_info.json").exists():
        info = StoreInfo.load(path)
        raise UserError(f"{directory} is unfinished; finish it with: {info.command}")
