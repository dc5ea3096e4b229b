"""TFDS directories of ArrayRecord shards, without TensorFlow: image datasets and token stores.

Both are opened by `tfds.builder_from_directory` as well. An image dataset has {id, image (encoded
bytes), label if there are classes}, splits as imported; for the other see token_store.py.
"""

import contextlib
import hashlib
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from tensorflow_datasets.core import example_serializer, naming, splits
from tensorflow_datasets.proto import tf_example_pb2

from dgpt_jax import gcs, open_files, shard_cache, shards
from dgpt_jax.bad_records import bad_record, one_line
from dgpt_jax.schema import UserError

UNDECODED = {"image": tfds.decode.SkipDecoding()}


def image_features(class_names: Sequence[str] | None) -> tfds.features.FeaturesDict:
    """Schema of an image dataset; with a label where there are classes."""
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
    }
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict(features)


def serializer(features: tfds.features.FeaturesDict) -> Callable[[Mapping], bytes]:
    """The function from examples to the bytes stored of them, the same bytes in every process: by
    itself protobuf writes the fields in an order that each process draws anew."""
    protos = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(example: Mapping) -> bytes:
        proto = protos.get_tf_example(features.encode_example(example))
        return proto.SerializeToString(deterministic=True)

    return serialize


def dataset_name(directory) -> str:
    """A valid TFDS name from the last part of a path."""
    name = re.sub(r"\W+", "_", epath.Path(directory).name.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"d_{name}"


def shard_path(directory, split: str, shard: int, of: int, name: str = "") -> epath.Path:
    """A shard's path; `name`: the dataset's, where the directory may have been renamed since."""
    name = name or dataset_name(directory)
    return epath.Path(directory) / f"{name}-{split}.array_record-{shard:05d}-of-{of:05d}"


def write_metadata(
    directory, features, written: Mapping[str, Sequence[shards.Receipt]], name: str = ""
):
    """TFDS's metadata (dataset_info.json, features.json) for shards that are all there: those of
    every split, in order."""
    directory = epath.Path(directory)
    infos = []
    for split, receipts in written.items():
        template = naming.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=name or dataset_name(directory),
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


@contextlib.contextmanager
def _metadata(directory, of: str = ""):
    """Whatever TFDS finds wrong with its metadata, in its parsers or later, as UserError."""
    try:
        yield
    except Exception as e:
        raise UserError(
            f"{directory}{of}: dataset_info.json or features.json cannot be read: {one_line(e)}"
        ) from None


def open_builder(directory):
    """The TFDS builder of a directory, or UserError that says what is wrong with it."""
    path = epath.Path(directory)
    if not path.exists():
        raise UserError(f"no such directory: {directory}")
    if not (path / "dataset_info.json").exists():
        raise UserError(f"{directory} is not a TFDS dataset: it has no dataset_info.json")
    with _metadata(directory):
        builder = tfds.builder_from_directory(directory)
    if (file_format := builder.info.file_format.value) != "array_record":
        raise UserError(
            f"{directory} is stored as {file_format}, training needs array_record: convert it with "
            f"`python -m tensorflow_datasets.scripts.convert_format --only_log_errors "
            f"--in_dir={shlex.quote(str(directory))} --out_dir=OUT --out_file_format=array_record`"
        )
    return builder


class Opened:
    """A TFDS directory as it is found: its builder, one listing, and what its manifest says.

    `cache` is where shards of a far directory go while they are read.
    """

    def __init__(self, directory: str | Path, cache: str = ""):
        gcs.require(directory)
        self.directory = os.fspath(directory)
        self.builder = open_builder(directory)
        self.sizes = shards.sizes(directory)
        self.cache = shard_cache.ShardCache(cache) if shards.is_remote(directory) else None
        self.manifest = shards.manifest(directory)

    def check(self, split: str):
        """Raises UserError unless every shard of a split is there and whole.

        Its size tells, where a manifest has it. Other files are opened; those that are far, not
        before they are fetched.
        """
        info = self.builder.info.splits[split]
        with _metadata(self.directory):
            names = [path.name for path in info.filepaths]
        for name in names:
            if name not in self.sizes:
                raise UserError(f"{self.directory}/{name} is missing")
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self._check_shard, names, info.shard_lengths))

    def _check_shard(self, name: str, length: int):
        path, size = f"{self.directory}/{name}", self.sizes[name]
        written = self.manifest.get(name)
        same = written is not None and written.bytes == size
        if same or self.cache is None:
            found = written.records if same else shards.count(path)
            if found != length:
                raise UserError(f"{path} holds {found} records, the metadata say {length}")
        if written is not None and not same:
            raise UserError(
                f"{path} has {size} bytes, and {written.bytes} were written "
                f"({shards.MANIFEST}): it is another file"
            )


class Split:
    """Random access to the examples of one split, image bytes undecoded. Picklable if near.

    Opening checks that every shard is whole; `opened` spares looking at the directory again. Files
    are opened when they are first read from. `digest` tells other contents, also of the same
    length. Raises UserError, about one example a BadRecord.
    """

    def __init__(self, directory: str | Path, split: str, opened: Opened | None = None):
        self.directory, self.split = os.fspath(directory), split
        opened = opened or Opened(directory)
        info = opened.builder.info
        base = split.partition("[")[0]
        if base not in info.splits:
            have = ", ".join(info.splits)
            raise UserError(f"{directory} has no split {base!r}; it has {have}")
        opened.check(base)
        with _metadata(directory, f", split {split}"):
            files = info.splits[split].file_instructions
        self.shards = tuple(
            shard_cache.Shard(bytes=opened.sizes[os.path.basename(file.filename)], **vars(file))
            for file in files
        )
        self._length = sum(shard.take for shard in self.shards)
        if not self._length:
            raise UserError(f"{directory} has no examples in split {split}")
        self.digest = _digest(self.shards, opened.manifest)
        self.features = info.features
        self.label = self.features["label"] if "label" in self.features else None
        self.cache = opened.cache
        self._source = None
        self._allow_files()

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> dict:
        record = self.raw(index := int(index))
        try:
            return self.parse(record)
        except Exception as e:  # of TFDS, protobuf and NumPy
            reason = f"it is not as features.json has it: {one_line(e)}"
            raise bad_record(self, index, _id_in(record), reason) from None

    def raw(self, index: int) -> bytes:
        """An example as it is stored."""
        source = self._source
        if source is None:
            source = self._source = self._open()
        try:
            return source[index]
        except RuntimeError as e:  # ArrayRecord's: a chunk's hash is another
            raise bad_record(self, index, "", e) from None

    def parse(self, record: bytes) -> dict:
        """Raises various where the bytes are not what the features say."""
        example = self.features.deserialize_example_np(record, decoders=UNDECODED)
        if empty := [name for name, value in example.items() if value is None]:
            raise ValueError(f"no value of {', '.join(empty)}")
        example["id"] = example_id(example)
        return example

    def close(self):
        """Closes the files as soon as nobody reads from them; the next reading opens them again."""
        self._source = None

    def _open(self):
        open_files.keep_memory()
        if self.cache is not None:
            return shard_cache.FarRecords(self.shards, self.cache)
        self._allow_files()
        return ArrayRecordDataSource(self.shards)

    def _allow_files(self):
        if self.cache is None:
            open_files.allow(2 * len(self.shards), self)

    def __getstate__(self):
        return self.__dict__ | {"_source": None}

    def __repr__(self) -> str:
        return f"Split({self.directory!r}, {self.split!r})"


def _digest(parts: Sequence[shard_cache.Shard], manifest: Mapping[str, shards.Receipt]) -> str:
    """16 hexadecimal digits of the contents of shards, in order: of their checksums, or of their
    sizes where no manifest has any."""
    sha = hashlib.sha256()
    for part in parts:
        receipt = manifest.get(os.path.basename(part.filename))
        content = receipt.crc32 if receipt else part.bytes
        sha.update(f"{part.skip} {part.take} {content}\n".encode())
    return sha.hexdigest()[:16]


def example_id(example: Mapping) -> str:
    """`id` or `file_name` of an example, else the CRC32 of its encoded image."""
    for key in ("id", "file_name"):
        if key in example:
            value = example[key]
            return value.decode() if isinstance(value, bytes) else str(value)
    return f"{zlib.crc32(example['image']):08x}"


def _id_in(record: bytes) -> str:
    """The id in a record of which other parts cannot be read; "" where it cannot either."""
    try:
        fields = tf_example_pb2.Example.FromString(record).features.feature
        return fields["id"].bytes_list.value[0].decode()
    except Exception:
        return ""
