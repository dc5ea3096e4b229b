"""Reader of the images in TensorBoard's event files: crops and predictions of a run."""

import struct
from collections.abc import Iterator
from typing import IO

from etils import epath
from google.protobuf.message import DecodeError

from dgpt_jax.monitoring import trackers

PNG = b"\x89PNG"
MAX_FILE_BYTES = 64 << 20  # a second to scan; longer runs log so many scalars that it takes minutes
MIN_RECORD, MAX_RECORD = 100, 8 << 20  # bytes of an event with an image; one with a scalar has 40


def latest(workdir: epath.Path) -> tuple[dict[str, tuple[int, bytes]], list[str]]:
    """Returns ({name: (step, PNG)} of the last image of each name, names of files that are too
    large to scan). Damaged or unfinished ends of files are ignored."""
    images, skipped = {}, []
    for path in sorted((workdir / "tensorboard").glob("events.out.tfevents.*")):
        if path.stat().length > MAX_FILE_BYTES:
            skipped.append(path.name)
            continue
        with path.open("rb") as file:
            for step, name, data in _images(file):
                images[name] = step, data
    return images, skipped


def _images(file: IO[bytes]) -> Iterator[tuple[int, str, bytes]]:
    """Yields (step, name, PNG) of an event file.

    A TFRecord is the length (uint64), its checksum, the event, and a checksum (4 bytes each).
    """
    proto = trackers.import_tensorboardx().proto.event_pb2
    while len(header := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", header[:8])
        if not MIN_RECORD <= length <= MAX_RECORD:
            if length > MAX_FILE_BYTES:  # damaged
                return
            file.seek(length + 4, 1)
            continue
        record = file.read(length + 4)
        try:
            event = proto.Event.FromString(record[:length])
        except DecodeError:  # the end of a file that is being written
            return
        for value in event.summary.value:
            if value.image.encoded_image_string.startswith(PNG):
                yield event.step, value.tag, value.image.encoded_image_string
