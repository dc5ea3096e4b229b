"""TFDS directories of ArrayRecord shards, without TensorFlow: image datasets and token stores.

`tfds.builder_from_directory` opens both. Image datasets have {id, image (encoded bytes), label if
there are classes, text columns if they were kept}; for token stores see data/token_store.py.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsInt

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, naming, splits

from dgpt_jax import invocation
from dgpt_jax.errors import UserError, bad_record, one_line
from dgpt_jax.storage import (
    array_record_shards,
    example_ids,
    file_limits,
    gcs,
    shard_cache,
    shard_checks,
    shard_records,
    tfds_metadata,
)
from dgpt_jax.storage.gcs import AnyPath

UNDECODED = {"image": tfds.decode.SkipDecoding()}


def image_features(
    class_names: Sequence[str] | None, texts: Sequence[str] = ()
) -> tfds.features.FeaturesDict:
    """Returns the schema of an image dataset, with a label if there are classes, and texts."""
    features = {
        **{name: tfds.features.Text() for name in texts},
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
    }
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict(features)


def serializer(features: tfds.features.FeaturesDict) -> Callable[[Mapping], bytes]:
    """Returns a function from examples to their serialized bytes.

    Serialization is deterministic: by default protobuf orders fields differently in each process.
    """
    info: Any = features.get_serialized_info()
    protos = example_serializer.ExampleSerializer(info)

    def serialize(example: Mapping) -> bytes:
        proto = protos.get_tf_example(features.encode_example(example))
        return proto.SerializeToString(deterministic=True)

    return serialize


def dataset_name(directory: AnyPath) -> str:
    """Returns a valid TFDS name derived from the last component of a path."""
    name = re.sub(r"\W+", "_", epath.Path(directory).name.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"d_{name}"


def shard_path(
    directory: AnyPath, split: str, shard: int, num_shards: int, name: str = ""
) -> epath.Path:
    """Returns a shard's path; name: of the dataset, in case its directory was renamed."""
    name = name or dataset_name(directory)
    return epath.Path(directory) / f"{name}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"


def write_metadata(
    directory: AnyPath,
    features: tfds.features.FeaturesDict,
    shards: Mapping[str, Sequence[array_record_shards.ShardInfo]],
    name: str = "",
) -> None:
    """Writes TFDS's metadata (dataset_info.json, features.json) for the complete shards of every
    split, in order."""
    directory = epath.Path(directory)
    split_infos = []
    for split, shard_infos in shards.items():
        template = naming.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=name or dataset_name(directory),
            split=split,
            filetype_suffix="array_record",
        )
        split_infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[info.records for info in shard_infos],
                num_bytes=sum(info.bytes for info in shard_infos),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=features, split_infos=split_infos, check_data=False
    )


def open_builder(directory: AnyPath) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a directory of ArrayRecord. Raises UserError."""
    builder = tfds_metadata.open_any_builder(directory)
    if (file_format := getattr(builder.info.file_format, "value", None)) != "array_record":
        raise UserError(
            f"{directory} is stored as {file_format}, array_record is needed: import it with "
            f"`{invocation.command('import')} {shlex.quote(os.fspath(directory))} --out=IMAGES`"
        )
    return builder


class Opened:
    """A TFDS directory: its builder, file sizes from one listing, and manifest.

    cache: of the shards of a remote one while they are read, or a directory for a new one.
    """

    def __init__(self, directory: AnyPath, cache: str | shard_cache.ShardCache = ""):
        gcs.require(directory)
        self.directory = os.fspath(directory)
        self.builder = open_builder(directory)
        self.sizes = array_record_shards.sizes(directory)
        self.cache = None
        if gcs.is_remote(directory):
            self.cache = shard_cache.ShardCache(cache) if isinstance(cache, str) else cache
        self.manifest = array_record_shards.manifest(directory)

    def check(self, split: str) -> None:
        """Raises UserError unless every shard of a split exists and is complete (shard_checks)."""
        info = self.builder.info.splits[split]
        with tfds_metadata.errors(self.directory):
            names = [path.name for path in info.filepaths]
        lengths = dict(zip(names, info.shard_lengths, strict=True))
        shard_checks.require_complete(
            self.directory, lengths, self.sizes, self.manifest, local=self.cache is None
        )


class Split:
    """Random access to the examples of one split, with encoded images. Picklable if local.

    Checks that every shard is complete; opened: avoids listing the directory again. Files are
    opened at the first read. `digest` identifies the contents. Raises UserError, and BadRecord
    for a single example.
    """

    def __init__(self, directory: AnyPath, split: str, opened: Opened | None = None):
        self.directory, self.split = os.fspath(directory), split
        opened = opened or Opened(directory)
        info = opened.builder.info
        base = split.partition("[")[0]
        if base not in info.splits:
            raise UserError(f"{directory} has no split {base!r}; it has {', '.join(info.splits)}")
        opened.check(base)
        with tfds_metadata.errors(directory, f", split {split}"):
            files = info.splits[split].file_instructions
        self.shards = tuple(
            shard_records.Shard(bytes=opened.sizes[os.path.basename(file.filename)], **vars(file))
            for file in files
        )
        self._length = sum(shard.take for shard in self.shards)
        if not self._length:
            raise UserError(f"{directory} has no examples in split {split}")
        self.digest = shard_checks.digest(self.shards, opened.manifest)
        self.features: Any = info.features
        self.label = self.features["label"] if "label" in self.features else None
        self._decoders = UNDECODED if "image" in self.features else None
        self.cache = opened.cache
        self._source = None
        self._allow_files()

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsInt) -> dict:
        record = self.raw(index := int(index))
        try:
            return self.parse(record)
        except Exception as e:  # from TFDS, protobuf or NumPy
            reason = f"it does not match features.json: {one_line(e)}"
            raise bad_record(self, index, example_ids.of_damaged(record), reason) from None

    def raw(self, index: int) -> bytes:
        """Returns a serialized example. Raises BadRecord."""
        source = self._source
        if source is None:
            source = self._source = self._open()
        try:
            return source[index]
        except RuntimeError as e:  # from ArrayRecord: wrong hash of a chunk
            raise bad_record(self, index, "", e) from None

    def parse(self, record: bytes) -> dict:
        """Returns an example. Raises various exceptions if it does not match the features."""
        example = self.features.deserialize_example_np(record, decoders=self._decoders)
        if empty := [name for name, value in example.items() if value is None]:
            raise ValueError(f"no value of {', '.join(empty)}")
        example["id"] = example_ids.of_example(example)
        return example

    def files_of(self, shard: int) -> list[shard_records.Shard]:
        """Returns the files that the examples of a shard are read from."""
        return [self.shards[shard]]

    def close(self) -> None:
        """Closes the files once no thread reads from them; the next read opens them again."""
        self._source = None

    def _open(self) -> shard_records.Records:
        file_limits.tune_malloc()
        if self.cache is not None:
            return shard_cache.RemoteRecords(self.shards, self.cache)
        self._allow_files()
        return shard_records.open_shards(self.shards)

    def _allow_files(self) -> None:
        if self.cache is None:
            file_limits.raise_fd_limit(2 * len(self.shards), self)

    def __getstate__(self):
        return self.__dict__ | {"_source": None}

    def __repr__(self) -> str:
        return f"Split({self.directory!r}, {self.split!r})"
