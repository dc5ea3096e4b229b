"""What a stored example is, and TFDS directories of ArrayRecord shards, without TensorFlow.

Two kinds of directory, both opened by `tfds.builder_from_directory` as well:
- an image dataset: {id, image (encoded bytes), label if there are classes}, splits as imported;
- a token store: one split a view (`view000`, …), {id, image (the rendered crop), tokens, box, flip,
  label if there is one}, and `token_store.json` (StoreInfo) beside TFDS's own metadata.
"""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import naming, splits

from dgpt_jax import token_codec
from dgpt_jax.schema import UserError

STORE_FILE = "token_store.json"
STORE_FORMAT = 1


@dataclass(frozen=True)
class StoreInfo:
    """What a token store says of itself; compared with the training config at start.

    `grid` is the teacher's (rows, columns), `cls` whether its CLS token comes first, `width` its C.
    `channel_scale`: C values for int8 (see token_codec.encode), none for float16. `cosine` is the
    measured (minimum, mean) of decoded to exact tokens.
    """

    codec: str
    grid: tuple[int, int]
    cls: bool
    width: int
    channel_scale: tuple[float, ...]
    cosine: tuple[float, float]
    picture_size: int
    picture: str
    teacher: dict
    source: dict
    views: dict
    code_version: str
    format: int = STORE_FORMAT

    @property
    def tokens(self) -> int:
        """Stored tokens an example."""
        return self.grid[0] * self.grid[1] + self.cls

    def save(self, directory):
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        (epath.Path(directory) / STORE_FILE).write_text(text)

    @classmethod
    def load(cls, directory) -> "StoreInfo":
        path = epath.Path(directory) / STORE_FILE
        if not path.exists():
            raise UserError(f"{directory} is not a token store: it has no {STORE_FILE}")
        values = json.loads(path.read_text())
        if values["format"] != STORE_FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, this code reads format {STORE_FORMAT}"
            )
        for name in ("grid", "cosine", "channel_scale"):
            values[name] = tuple(values[name])
        return cls(**values)


def is_token_store(directory) -> bool:
    return (epath.Path(directory) / STORE_FILE).exists()


def view_split(view: int) -> str:
    return f"view{view:03d}"


def image_features(class_names: Sequence[str] | None) -> tfds.features.FeaturesDict:
    """Schema of an image dataset; with a label where there are classes."""
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
    }
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict(features)


def token_features(info: StoreInfo, label) -> tfds.features.FeaturesDict:
    """Schema of a token store; `label` is the source's ClassLabel feature or None."""
    size = info.picture_size
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(size, size, 3)),
        # Bytes, not a list of integers: a sixth of the size and forty times as fast to parse.
        "tokens": tfds.features.Tensor(
            shape=(info.tokens, info.width),
            dtype=token_codec.CODECS[info.codec],
            encoding=tfds.features.Encoding.BYTES,
        ),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "flip": tfds.features.Scalar(dtype=np.int32),
    }
    if label is not None:
        features["label"] = label
    return tfds.features.FeaturesDict(features)


def dataset_name(directory) -> str:
    """A valid TFDS name from the last part of a path."""
    name = re.sub(r"\W+", "_", epath.Path(directory).name.lower()).strip("_")
    return name if name[:1].isalpha() else f"d_{name}"


def shard_path(directory, split: str, shard: int, shards: int) -> epath.Path:
    name = f"{dataset_name(directory)}-{split}.array_record-{shard:05d}-of-{shards:05d}"
    return epath.Path(directory) / name


def write_shard(path: epath.Path, features, examples: Iterable[Mapping]) -> int:
    """Writes one shard under a temporary name and renames it when complete; returns its length."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
    written = 0
    try:
        for example in examples:
            writer.write(features.serialize_example(example))
            written += 1
        writer.close()
        temporary.replace(path)
    except BaseException:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)
        raise
    return written


def shard_length(path: epath.Path) -> int:
    """Records in a shard; raises UserError where the file is damaged."""
    try:
        reader = ArrayRecordReader(os.fspath(path))
        length = reader.num_records()
        reader.close()
        return length
    except Exception as e:  # array_record raises various, and once more when it is closed
        reason = str(e).split("\n")[0][:200]
        raise UserError(f"{path} is damaged or truncated: {reason}") from None


def write_metadata(directory, features, shard_lengths: Mapping[str, Sequence[int]]):
    """TFDS's metadata (dataset_info.json, features.json) for shards that are all there."""
    directory = epath.Path(directory)
    infos = []
    for split, lengths in shard_lengths.items():
        paths = [shard_path(directory, split, i, len(lengths)) for i in range(len(lengths))]
        template = naming.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=dataset_name(directory),
            split=split,
            filetype_suffix="array_record",
        )
        infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=list(lengths),
                num_bytes=sum(p.stat().length for p in paths),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features, split_infos=infos, check_data=False
    )


def open_builder(directory):
    """The TFDS builder of a directory, or UserError that says what is wrong with it."""
    path = epath.Path(directory)
    if not path.exists():
        raise UserError(f"no such directory: {directory}")
    if not (path / "dataset_info.json").exists():
        raise UserError(f"{directory} is not a TFDS dataset: it has no dataset_info.json")
    builder = tfds.builder_from_directory(directory)
    if (file_format := builder.info.file_format.value) != "array_record":
        raise UserError(
            f"{directory} is stored as {file_format}, training needs array_record: convert it with "
            f"`python -m tensorflow_datasets.scripts.convert_format --only_log_errors "
            f"--in_dir={directory} --out_dir=OUT --out_file_format=array_record`"
        )
    return builder


class Split:
    """Random access to the examples of one split, image bytes undecoded. Picklable.

    Opening checks that every shard is whole. Raises UserError.
    """

    def __init__(self, directory: str | Path, split: str):
        self.directory, self.split = os.fspath(directory), split
        builder = open_builder(directory)
        base = split.partition("[")[0]
        if base not in builder.info.splits:
            have = ", ".join(builder.info.splits)
            raise UserError(f"{directory} has no split {base!r}; it has {have}")
        info = builder.info.splits[base]
        for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
            if not path.exists():
                raise UserError(f"{path} is missing")
            if (found := shard_length(path)) != length:
                raise UserError(f"{path} holds {found} records, the metadata say {length}")
        features = builder.info.features
        self.label = features["label"] if "label" in features else None
        self._source = None
        self._length = builder.info.splits[split].num_examples
        if not self._length:
            raise UserError(f"{directory} has no examples in split {split}")

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> dict:
        if self._source is None:
            skip = {"image": tfds.decode.SkipDecoding()}
            builder = tfds.builder_from_directory(self.directory)
            self._source = builder.as_data_source(self.split, decoders=skip)
        example = self._source[int(index)]
        example["id"] = example_id(example)
        return example

    def __getstate__(self):
        return self.__dict__ | {"_source": None}

    def __repr__(self) -> str:
        return f"Split({self.directory!r}, {self.split!r})"


def example_id(example: Mapping) -> str:
    """`id` or `file_name` of an example, else the CRC32 of its encoded image."""
    for key in ("id", "file_name"):
        if key in example:
            value = example[key]
            return value.decode() if isinstance(value, bytes) else str(value)
    return f"{zlib.crc32(example['image']):08x}"
