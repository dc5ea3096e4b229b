"""Ids of the examples of TFDS datasets."""

import zlib
from collections.abc import Mapping

from tensorflow_datasets.proto import tf_example_pb2


def of_example(example: Mapping) -> str:
    """Returns `id` or `file_name` of an example, else the CRC32 of its encoded image."""
    for key in ("id", "file_name"):
        if key in example:
            value = example[key]
            return value.decode() if isinstance(value, bytes) else str(value)
    return f"{zlib.crc32(example['image']):08x}"


def of_damaged(record: bytes) -> str:
    """Returns the id in a record whose other fields are damaged, "" if it cannot be read either."""
    try:
        fields = tf_example_pb2.Example.FromString(record).features.feature  # pyright: ignore[reportAttributeAccessIssue]
        return fields["id"].bytes_list.value[0].decode()
    except Exception:
        return ""
