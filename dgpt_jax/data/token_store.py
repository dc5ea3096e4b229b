"""Token stores: TFDS directories with a split a view (`view000`, …) and `token_store.json`.

An example is {id, image (the rendered crop), tokens (as token_codec packs them), box, flip, label
if the source has one}. The JSON, StoreInfo, says what made the store; it is written before the
first shard, TFDS's own metadata after the last.
"""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax import token_codec
from dgpt_jax.bad_records import one_line
from dgpt_jax.schema import UserError, one_of, parse
from dgpt_jax.token_codec import Codec

STORE_FILE = "token_store.json"
BASIS_FILE = "basis.npy"
FORMAT = 2


@dataclass(frozen=True)
class StoreInfo:
    """What a token store says of itself; compared with the training config at start.

    `name` begins the names of its files. `codec` is one of token_codec.CODECS. `grid` is the
    teacher's (rows, columns), `cls` whether its CLS token comes first, `width` the channels stored:
    the teacher's C, or C′ after PCA. `channel_scale`: a value for each, none for float16. `cosine`:
    the measured (minimum, mean) of decoded to exact tokens. `variance`: the share that PCA keeps; 1
    without it. `example_bytes`: a stored example's mean size, measured on the sample. `command`
    began the store and finishes it.
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
    picture_size: int
    picture: str
    teacher: dict
    source: dict
    views: dict
    command: str
    code_version: str
    format: int = FORMAT

    @property
    def tokens(self) -> int:
        """Stored tokens an example."""
        return self.grid[0] * self.grid[1] + self.cls

    @property
    def is_reduced(self) -> bool:
        """Whether tokens were projected by PCA."""
        return self.width != self.teacher["width"]

    def save(self, directory):
        """Writes the JSON whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        half = epath.Path(directory) / f".{STORE_FILE}.partial"
        half.write_text(text)
        half.replace(epath.Path(directory) / STORE_FILE)

    @classmethod
    def load(cls, directory) -> "StoreInfo":
        path = epath.Path(directory) / STORE_FILE
        if not path.exists():
            raise UserError(f"{directory} is not a token store: it has no {STORE_FILE}")
        try:
            values = json.loads(path.read_text())
            format = values["format"]
            if format == FORMAT:
                info = parse(cls, values, str(path))
                one_of(f"{path}: codec", info.codec, token_codec.CODECS)
                return info
        except UserError as e:
            raise UserError(f"{path} is damaged, or newer than this code: {e}") from None
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} is damaged: {type(e).__name__}: {one_line(e)}") from None
        raise UserError(
            f"{path} has format {format}, this code reads format {FORMAT}: build the store again"
        )

    def load_codec(self, directory) -> Codec:
        """The codec, with its basis where there is one."""
        basis = None
        if self.is_reduced:
            basis = _basis(epath.Path(directory) / BASIS_FILE)
            if basis.shape != (self.teacher["width"], self.width):
                raise UserError(
                    f"{directory}/{BASIS_FILE} is {basis.shape}, and {STORE_FILE} has "
                    f"{(self.teacher['width'], self.width)} channels"
                )
        return Codec(self.codec, np.asarray(self.channel_scale, np.float32), basis)


def _basis(path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is no readable array: {one_line(e)}") from None


def exists(directory) -> bool:
    return (epath.Path(directory) / STORE_FILE).exists()


def view_split(view: int) -> str:
    return f"view{view:03d}"


def features(info: StoreInfo, label) -> tfds.features.FeaturesDict:
    """Schema of a token store; `label` is the source's ClassLabel feature or None."""
    size = info.picture_size
    found = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(size, size, 3)),
        # Bytes, not a list of integers: a sixth of the size and forty times as fast to parse.
        "tokens": tfds.features.Tensor(
            shape=(info.tokens, token_codec.stored_width(info.codec, info.width)),
            dtype=token_codec.CODECS[info.codec],
            encoding=tfds.features.Encoding.BYTES,
        ),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "flip": tfds.features.Scalar(dtype=np.int32),
    }
    return tfds.features.FeaturesDict(found if label is None else found | {"label": label})


def refuse_others(directory, stored: tfds.features.FeaturesDict):
    """Raises UserError where what TFDS says of a store's examples is not what StoreInfo says."""
    info = StoreInfo.load(directory)
    wanted = features(info, None)
    for name in ("image", "tokens"):
        have, want = stored[name] if name in stored else None, wanted[name]
        if have is None or (have.shape, have.np_dtype) != (want.shape, want.np_dtype):
            raise UserError(
                f"{directory} is damaged: by {STORE_FILE} its {name} are {want.shape} "
                f"{np.dtype(want.np_dtype)}, by features.json "
                + ("absent" if have is None else f"{have.shape} {np.dtype(have.np_dtype)}")
            )
    if len(info.channel_scale) != (0 if info.codec == "float16" else info.width):
        raise UserError(
            f"{directory}/{STORE_FILE} is damaged: {len(info.channel_scale)} scales for "
            f"{info.width} channels"
        )


def refuse_unfinished(directory):
    """Raises UserError with the command that finishes it, if the store's build has not ended."""
    path = epath.Path(directory)
    if exists(path) and not (path / "dataset_info.json").exists():
        info = StoreInfo.load(path)
        raise UserError(
            f"{directory} is unfinished: its build has not come to its end. Finish it with: "
            f"{info.command}"
        )
