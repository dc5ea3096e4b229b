"""Bad records: a one-line error, or a replacement that is the same on every process."""

import contextlib
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import train
from dgpt_jax.config import DataConfig, ModelConfig, TokensConfig, TrainConfig, schema
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset, image_ops, loader, token_store
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support import data

MODEL = parse(ModelConfig, {"image_size": 16, "patch": 4})
BOMB = 30_000


def png(height: int, width: int, rows: bytes = b"") -> bytes:
    """Builds a PNG from chunks, with any header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(data.smooth_image(np.random.default_rng(seed), height, width))
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def jpeg_bomb() -> bytes:
    """A JPEG of 16×16 pixels whose header says 30,000×30,000."""
    content, mark = jpeg(16, 16), struct.pack(">HH", 16, 16)
    return content.replace(mark, struct.pack(">HH", BOMB, BOMB), 1)


# Undecodable bytes and the error message.
IMAGES = {
    "empty": (b"", "0 bytes that are not a readable image"),
    "text": (b"no image", "8 bytes that are not a readable image"),
    "truncated": (jpeg(64, 64)[:-200], "bytes that are not a readable image"),
    "flipped header": (jpeg(64, 64).replace(b"\xff\xdb", b"\xff\x5b"), "not a readable image"),
    "bomb, PNG": (png(BOMB, BOMB), r"too large: .*900000000 pixels"),
    "bomb, JPEG": (jpeg_bomb(), r"too large: .*900000000 pixels"),
    "zero height": (png(0, 16), "not a readable image"),
    "zero width": (png(16, 0), "not a readable image"),
}


def write_images(directory, encoded, shard_size: int = 100):
    """Writes an image dataset of encoded images by id, valid or not."""
    features = tfds_dataset.image_features(None)
    serialize = tfds_dataset.serializer(features)
    examples = [serialize({"id": name, "image": image}) for name, image in encoded.items()]
    directory.mkdir()
    starts = range(0, len(examples), shard_size)
    receipts = [
        array_record_shards.write(
            tfds_dataset.shard_path(directory, "train", i, len(starts)),
            examples[start : start + shard_size],
        )
        for i, start in enumerate(starts)
    ]
    tfds_dataset.write_metadata(directory, features, {"train": receipts})
    return directory


def opened(path, **changes) -> dataset.ExampleDataset:
    return dataset.open_examples(parse(DataConfig, {"path": str(path)} | changes), MODEL, seed=3)


def opened_images(path, **changes) -> dataset.ExampleDataset:
    return opened(path, **({"targets": "pixels", "threads": 2} | changes))


def batches(examples, count, size=4, *, start=0, rows=None):
    rows = np.arange(size) if rows is None else rows
    stream = loader.train_batches(examples, size, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("kind", IMAGES)
def test_undecodable_images(tmp_path, kind):
    content, message = IMAGES[kind]
    path = write_images(tmp_path / "set", {"a": jpeg(16, 16), "b/c.jpg": content})
    with pytest.raises(UserError) as caught:
        opened_images(path, bad_records="error")(0, 1)
    line = str(caught.value)
    assert line.startswith(f"Split('{path}', 'train'): example 1 (b/c.jpg): ") and "\n" not in line
    assert re.search(message, line)


def test_ids_are_escaped_in_errors(tmp_path):
    path = write_images(tmp_path / "set", {"é\n\x1b[2J.jpg": b"no image"})
    with pytest.raises(UserError, match=r"example 0 \(é\\n\\x1b\[2J.jpg\): 8 bytes"):
        opened_images(path, bad_records="error")(0, 0)


def test_decompression_bombs_are_rejected_before_allocation(monkeypatch):
    monkeypatch.setattr(image_ops.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    for content in (png(BOMB, BOMB), jpeg_bomb(), png(1, 178_956_971), png(178_956_971, 1)):
        with pytest.raises(ValueError, match="too large"):
            image_ops.decode_image(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as notebooks do
    with pytest.raises(ValueError, match="too large: 30000×30000 pixels"):
        image_ops.decode_image(png(BOMB, BOMB))


def test_flipped_bytes_of_a_jpeg():
    """JPEG has no checksum, but its shard has."""
    expected_batches, rng, counts = (
        jpeg(64, 64),
        np.random.default_rng(0),
        {"error": 0, "decoded": 0},
    )
    for _ in range(300):
        content = bytearray(expected_batches)
        for offset in rng.integers(0, len(content), 3):
            content[offset] ^= 1 << rng.integers(8)
        try:
            assert image_ops.decode_image(bytes(content)).ndim == 3
            counts["decoded"] += 1
        except ValueError:
            counts["error"] += 1
    assert min(counts.values()) > 5


BAD = (5, 6, 30)


@pytest.fixture(scope="module")
def spotted(tmp_path_factory):
    """An image dataset of 40 examples in several shards, three of them bad."""
    encoded = {f"{i}.jpg": jpeg(20, 24, seed=i) for i in range(40)}
    encoded |= {f"{i}.jpg": content for i, (content, _) in zip(BAD, list(IMAGES.values())[2:])}
    return write_images(tmp_path_factory.mktemp("spotted") / "set", encoded, shard_size=16)


def test_skipped_examples_are_replaced_by_the_next(spotted, capfd):
    examples = opened_images(spotted, max_bad_fraction=0.1)
    for index, replacement in ((4, 4), (5, 7), (6, 7), (30, 31)):
        for key, value in examples(9, replacement).items():
            np.testing.assert_array_equal(examples(9, index)[key], value)
    message = capfd.readouterr().err
    for index in BAD:  # once each
        assert message.count(f"Split('{spotted}', 'train'): example {index} ({index}.jpg)") == 1


def test_batches_with_replacements_are_the_same_on_any_process(spotted):
    """For any start step, threads and workers; so is their count."""
    expected_batches = batches(first := opened_images(spotted, max_bad_fraction=0.1), 20)
    assert first.counters()["bad_records"] == 2 * len(BAD)  # two epochs
    bad_records = 0
    for rows in map(np.array, ([0, 3], [1, 2])):
        for workers in (0, 2):
            examples = opened_images(
                spotted, max_bad_fraction=0.1, workers=workers, threads=1 + workers
            )
            local = batches(examples, 10, start=10, rows=rows)
            bad_records += examples.counters()["bad_records"] * (workers > 0)
            for batch, expected in zip(local, expected_batches[10:], strict=True):
                assert batch.keys() == expected.keys()
                for key, value in batch.items():
                    np.testing.assert_array_equal(value, expected[key][rows])
    assert bad_records == len(BAD)  # of both processes, in one epoch


def test_batch_ids_are_those_of_replacements(spotted):
    examples = opened_images(spotted, max_bad_fraction=0.1)
    names = loader.batch_ids(examples, 40, rows=np.arange(40), step=0)
    assert len(set(names)) == 37 and not {f"train/{index}.jpg" for index in BAD} & set(names)
    assert names.count("train/7.jpg") == 3 and names.count("train/31.jpg") == 2


def test_too_many_bad_records_are_fatal(spotted):
    with pytest.raises(UserError, match=r"1 bad record in 40 .*config.data.max_bad_fraction=0.001"):
        batches(opened_images(spotted), 10)
    with pytest.raises(UserError, match="2 bad records in 40"):
        opened_images(spotted, max_bad_fraction=0.04)(0, 5)  # 5 and 6 follow each other
    examples = opened_images(spotted, max_bad_fraction=3 / 40)
    batches(examples, 50)  # 200 examples, 15 bad ones
    assert examples.counters()["bad_records"] == 15
    with pytest.raises(UserError, match="bad records in 40"):
        batches(opened_images(spotted, max_bad_fraction=2 / 40), 10)


def test_only_bad_records(tmp_path):
    path = write_images(tmp_path / "set", {str(i): b"no image" for i in range(9)})
    with pytest.raises(UserError, match="10 bad records in 9"):
        batches(opened_images(path, max_bad_fraction=1.0), 1)


@pytest.mark.slow
def test_training_logs_bad_records(spotted, tmp_path, capfd):
    settings = dict(
        total="10 steps", batch_size=8, log_every=1,
        model=data.TINY | {"depth": 1, "decoder_depth": 1},
        data={"path": str(spotted), "targets": "pixels", "max_bad_fraction": 0.1, "threads": 2},
        loss={"visible": 0.0}, checkpoint={"every": "100%"}, optim={"warmup": "1 steps"},
    )  # fmt: skip
    assert train.train(schema.parse(TrainConfig, settings), tmp_path / "run") == 0
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [line["bad_records"] for line in lines if "loss" in line]
    assert counts == sorted(counts) and counts[-1] >= 2 * len(BAD) and counts[0] < counts[-1]
    message = capfd.readouterr().err
    assert all(message.count(f"({index}.jpg)") == 1 for index in BAD)


def test_token_stores_reject_bad_records(spotted, tmp_path):
    with pytest.raises(UserError) as caught:
        data.token_store(tmp_path, spotted, data.random_teacher(tmp_path / "teacher"))
    line = str(caught.value)
    assert re.search(r"'train'\): example \d+ \(\d+.jpg\): .*tools/import_images.py", line)
    assert not token_store.exists(tmp_path / "tokens") and "\n" not in line


@pytest.mark.parametrize(
    "text,message",
    [
        ("config.data.bad_records=warn", "config.data.bad_records.*'warn'"),
        (
            "config.data.max_bad_fraction=1.5",
            "config.data.max_bad_fraction.*1.5",
        ),
        ("config.data.max_bad_fraction=-1", "config.data.max_bad_fraction.*-1"),
    ],
)
def test_settings(text, message):
    config = schema.default_config(TrainConfig)
    config.data.path = "somewhere"
    with pytest.raises(UserError, match=message):
        schema.override(config, TrainConfig, *text.split("="))
        parse(TrainConfig, config)
    assert parse(TokensConfig, {"source": "x"})
