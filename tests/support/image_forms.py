"""The same labelled, captioned images as a folder, zip, parquet, WebDataset shards and TFRecord."""

import io
import itertools
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from dgpt_jax.storage import array_record_shards, tfds_dataset

CLASSES = ("ant", "bee", "cat, big", "dog")


@dataclass(frozen=True)
class Sample:
    """key: name without folder and extension, unique."""

    key: str
    label: int
    caption: str
    png: bytes


def samples(count: int) -> list[Sample]:
    """Images of random pixels, in no order of classes."""
    rng = np.random.default_rng(0)
    result = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(buffer, "PNG")
        caption = f"image {i} “ü”"
        label = int(rng.integers(len(CLASSES)))
        result.append(Sample(f"{i:06d}", label, caption, buffer.getvalue()))
    return result


def write_folder(root: Path, images: list[Sample]) -> Path:
    for x in images:
        folder = root / CLASSES[x.label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{x.key}.png").write_bytes(x.png)
    return root


def write_zip(
    path: Path, images: list[Sample], method: int = zipfile.ZIP_STORED, *, stream: bool = False
) -> Path:
    """A zip of class folders; stream: sizes and checksums follow the data, as when it is piped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        target = _Unseekable(file) if stream else file
        with zipfile.ZipFile(target, "w", method) as archive:
            for x in images:
                archive.writestr(f"{CLASSES[x.label]}/{x.key}.png", x.png)
    return path


class _Unseekable(io.RawIOBase):
    def __init__(self, file):
        self._file = file

    def writable(self):
        return True

    def write(self, data):
        return self._file.write(data)


def features(*images: str, labels=("label",)) -> dict:
    """Hugging Face's features of image and label columns."""
    return {
        **{name: {"_type": "Image"} for name in images},
        **{name: {"names": list(CLASSES), "_type": "ClassLabel"} for name in labels},
        "caption": {"dtype": "string", "_type": "Value"},
    }


def table(images: list[Sample], *, path: str = "{key}.png", metadata: bool = True) -> pa.Table:
    """The columns image {bytes, path}, label, caption, as Hugging Face writes them."""
    content = pa.table(
        {
            "image": [{"bytes": x.png, "path": path.format(key=x.key)} for x in images],
            "label": pa.array([x.label for x in images], pa.int64()),
            "caption": [x.caption for x in images],
        }
    )
    if metadata:
        info = {"info": {"features": features("image")}}
        content = content.replace_schema_metadata({"huggingface": json.dumps(info)})
    return content


def write_parquet(
    root: Path, images: list[Sample], shards: int = 1, *, split="train", rows=50, **kwargs
) -> Path:
    """Files SPLIT-00000-of-00003.parquet, with row groups of `rows` rows."""
    root.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(divided(images, shards)):
        file = root / f"{split}-{i:05d}-of-{shards:05d}.parquet"
        pq.write_table(table(part, **kwargs), file, row_group_size=rows)
    return root


def divided(images: list[Sample], shards: int) -> list[list[Sample]]:
    ends = np.linspace(0, len(images), shards + 1).astype(int).tolist()
    return [images[a:b] for a, b in itertools.pairwise(ends)]


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(x: Sample) -> list[tuple[str, bytes]]:
    """Members of a sample: image, class, caption, and the JSON that img2dataset writes."""
    about = json.dumps({"caption": x.caption, "url": f"http://x/{x.key}", "label": x.label})
    return [
        (f"{x.key}.cls", b"%d\n" % x.label), (f"{x.key}.json", about.encode()),
        (f"{x.key}.png", x.png), (f"{x.key}.txt", x.caption.encode()),
    ]  # fmt: skip


def write_shards(root: Path, images: list[Sample], shards: int = 3, name="{:05d}.tar") -> Path:
    """WebDataset shards, and the names of their classes."""
    for i, part in enumerate(divided(images, shards)):
        write_members(root / name.format(i), [m for x in part for m in members(x)])
    (root / "classnames.txt").write_text("\n".join(CLASSES))
    return root


def write_tfrecord(root: Path, images: list[Sample]) -> Path:
    """A TFDS dataset as TFDS writes it with TensorFlow, in two files of one split."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
            "file_name": tfds.features.Text(),
            "caption": tfds.features.Text(),
        }
    )
    serialize, lengths = tfds_dataset.serializer(features), []
    root.mkdir(parents=True, exist_ok=True)
    name = tfds_dataset.dataset_name(root)
    for i, part in enumerate(divided(images, 2)):
        records = [
            serialize(
                {
                    "image": x.png, "label": x.label, "file_name": f"{x.key}.png",
                    "caption": x.caption,
                }
            )
            for x in part
        ]  # fmt: skip
        data = b"".join(map(framed, records))
        (root / f"{name}-train.tfrecord-{i:05d}-of-00002").write_bytes(data)
        lengths.append(array_record_shards.ShardInfo(len(part), len(data), ""))
    tfds_dataset.write_metadata(root, features, {"train": lengths})
    info = json.loads((root / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info["fileFormat"] = "tfrecord"
    (root / "dataset_info.json").write_text(json.dumps(info))
    return root


def framed(data: bytes) -> bytes:
    """One record of TFRecord."""
    length = len(data).to_bytes(8, "little")

    def crc(content: bytes) -> bytes:
        value = google_crc32c.value(content)
        rotated = (value >> 15 | value << 17) & 0xFFFFFFFF
        return ((rotated + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    return length + crc(length) + data + crc(data)
