"""TFDS directories of ArrayRecord shards, without TensorFlow: image datasets and token stores.

Both are opened by `tfds.builder_from_directory` as well. An image dataset has {id, image (encoded
bytes), label if there are classes}, splits as imported; for the other see token_store.py.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, naming, splits

from dgpt_jax import shards
from dgpt_jax.schema import UserError


def image_features(class_names: Sequence[str] | None) -> tfds.features.FeaturesDict:
    """Schema of an image dataset; with a label where there are classes."""
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
    }
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict(features)


def serializer(features: tfds.features.FeaturesDict) -> Callable[[dict], bytes]:
    """What turns an example into bytes, the same ones in every process.

    `features.serialize_example` leaves the order of an example's fields to protobuf, which takes
    another one from process to process: a shard that is written again would not be the same.
    """
    to_proto = example_serializer.ExampleSerializer(features.get_serialized_info()).get_tf_example
    encode = features.encode_example
    return lambda example: to_proto(encode(example)).SerializeToString(deterministic=True)


def dataset_name(directory) -> str:
    """A valid TFDS name from the last part of a path."""
    name = re.sub(r"\W+", "_", epath.Path(directory).name.lower()).strip("_")
    return name if name[:1].isalpha() else f"d_{name}"


def shard_path(directory, split: str, shard: int, of: int) -> epath.Path:
    name = f"{dataset_name(directory)}-{split}.array_record-{shard:05d}-of-{of:05d}"
    return epath.Path(directory) / name


def write_metadata(directory, features, written: Mapping[str, Sequence[shards.Receipt]]):
    """TFDS's metadata (dataset_info.json, features.json) for shards that are all there: those of
    every split, in order."""
    directory = epath.Path(directory)
    infos = []
    for split, receipts in written.items():
        template = naming.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=dataset_name(directory),
            split=split,
            filetype_suffix="array_record",
        )
        infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[receipt.records for receipt in receipts],
                num_bytes=sum(receipt.bytes for receipt in receipts),
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
            if (found := shards.count(path)) != length:
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
