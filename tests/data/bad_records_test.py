"""Damage of every kind: one line that names it, or a replacement that is the same everywhere."""

import contextlib
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import batching, pipeline, records, schema, shards, token_store, train, views
from dgpt_jax.config import Data, Model, Tokens, Train
from dgpt_jax.schema import UserError, parse
from tests import data

MODEL = parse(Model, {"image_size": 16, "patch": 4})
BOMB = 30_000


def png(height: int, width: int, rows: bytes = b"") -> bytes:
    """A PNG by its parts, so that its header may say what no library would write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(data.smooth_image(np.random.default_rng(seed), height, width))
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def jpeg_bomb() -> bytes:
    """A JPEG of 16×16 pixels whose header says 30,000×30,000."""
    content, mark = jpeg(16, 16), struct.pack(">HH", 16, 16)
    return content.replace(mark, struct.pack(">HH", BOMB, BOMB), 1)


# What an image can be, and what is said of it.
IMAGES = {
    "empty": (b"", "0 bytes that are no readable image"),
    "text": (b"no image", "8 bytes that are no readable image"),
    "truncated": (jpeg(64, 64)[:-200], "bytes that are no readable image"),
    "flipped header": (jpeg(64, 64).replace(b"\xff\xdb", b"\xff\x5b"), "no readable image"),
    "bomb, PNG": (png(BOMB, BOMB), r"too large: .*900000000 pixels"),
    "bomb, JPEG": (jpeg_bomb(), r"too large: .*900000000 pixels"),
    "zero height": (png(0, 16), "no readable image"),
    "zero width": (png(16, 0), "no readable image"),
}


def write_images(directory, encoded, shard_size: int = 100):
    """An image dataset of the bytes {id: image}, whatever they are."""
    features = records.image_features(None)
    serialize = records.serializer(features)
    examples = [serialize({"id": name, "image": image}) for name, image in encoded.items()]
    directory.mkdir()
    starts = range(0, len(examples), shard_size)
    receipts = [
        shards.write(
            records.shard_path(directory, "train", i, len(starts)),
            examples[start : start + shard_size],
        )
        for i, start in enumerate(starts)
    ]
    records.write_metadata(directory, features, {"train": receipts})
    return directory


def opened(path, **changes) -> pipeline.Examples:
    return pipeline.open_examples(parse(Data, {"path": str(path)} | changes), MODEL, seed=3)


def opened_images(path, **changes) -> pipeline.Examples:
    return opened(path, **({"targets": "pixels", "threads": 2} | changes))


def batches(examples, count, size=4, *, start=0, rows=None):
    rows = np.arange(size) if rows is None else rows
    stream = batching.train_batches(examples, size, rows=rows, start_step=start)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_cannot_be_decoded(tmp_path, kind):
    content, said = IMAGES[kind]
    path = write_images(tmp_path / "set", {"a": jpeg(16, 16), "b/c.jpg": content})
    with pytest.raises(UserError) as caught:
        opened_images(path, bad_records="error")(0, 1)
    line = str(caught.value)
    assert line.startswith(f"Split('{path}', 'train'): example 1 (b/c.jpg): ") and "\n" not in line
    assert re.search(said, line)


def test_an_id_may_hold_anything(tmp_path):
    path = write_images(tmp_path / "set", {"é\n\x1b[2J.jpg": b"no image"})
    with pytest.raises(UserError, match=r"example 0 \(é\\n\\x1b\[2J.jpg\): 8 bytes"):
        opened_images(path, bad_records="error")(0, 0)


def test_a_bomb_is_refused_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr(views.cv2, "imdecode", lambda *_: pytest.fail("it is decoded"))
    for content in (png(BOMB, BOMB), jpeg_bomb(), png(1, 178_956_971), png(178_956_971, 1)):
        with pytest.raises(ValueError, match="too large"):
            views.decode_picture(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as notebooks do
    with pytest.raises(ValueError, match="too large: 30000×30000 pixels"):
        views.decode_picture(png(BOMB, BOMB))


def test_flipped_bytes_of_a_jpeg_are_an_error_or_another_picture():
    """It has no checksum: its shard has, see below."""
    whole, rng, found = jpeg(64, 64), np.random.default_rng(0), {"error": 0, "picture": 0}
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 3):
            content[place] ^= 1 << rng.integers(8)
        try:
            assert views.decode_picture(bytes(content)).ndim == 3
            found["picture"] += 1
        except ValueError:
            found["error"] += 1
    assert min(found.values()) > 5


BAD = (5, 6, 30)


@pytest.fixture(scope="module")
def spotted(tmp_path_factory):
    """An image dataset of 40 in several shards, three of them bad."""
    encoded = {f"{i}.jpg": jpeg(20, 24, seed=i) for i in range(40)}
    encoded |= {f"{i}.jpg": content for i, (content, _) in zip(BAD, list(IMAGES.values())[2:])}
    return write_images(tmp_path_factory.mktemp("spotted") / "set", encoded, shard_size=16)


def test_skipped_examples_are_replaced_by_the_next(spotted, capfd):
    examples = opened_images(spotted, bad_most=0.1)
    for index, taken in ((4, 4), (5, 7), (6, 7), (30, 31)):
        for key, value in examples(9, taken).items():
            np.testing.assert_array_equal(examples(9, index)[key], value)
    said = capfd.readouterr().err
    for index in BAD:  # once each
        assert (
            said.count(f"is taken: Split('{spotted}', 'train'): example {index} ({index}.jpg)") == 1
        )


def test_batches_with_skipped_examples_are_the_same_everywhere(spotted):
    """For any start, processes, threads and workers; and so is the count."""
    whole = batches(first := opened_images(spotted, bad_most=0.1), 20)
    assert first.counters()["bad_records"] == 2 * len(BAD)  # two epochs
    parts = 0
    for rows in map(np.array, ([0, 3], [1, 2])):
        for workers in (0, 2):
            part = opened_images(spotted, bad_most=0.1, workers=workers, threads=1 + workers)
            mine = batches(part, 10, start=10, rows=rows)
            parts += part.counters()["bad_records"] * (workers > 0)
            for batch, expected in zip(mine, whole[10:], strict=True):
                assert batch.keys() == expected.keys()
                for key, value in batch.items():
                    np.testing.assert_array_equal(value, expected[key][rows])
    assert parts == len(BAD)  # of both processes, in one epoch


def test_ids_of_a_batch_are_those_of_the_replacements(spotted):
    examples = opened_images(spotted, bad_most=0.1)
    names = batching.batch_ids(examples, 40, rows=np.arange(40), step=0)
    assert len(set(names)) == 37 and not {f"train/{index}.jpg" for index in BAD} & set(names)
    assert names.count("train/7.jpg") == 3 and names.count("train/31.jpg") == 2


def test_more_than_the_share_is_fatal(spotted):
    with pytest.raises(UserError, match=r"1 bad records to 40 .* 0.001 .*config.data.bad_most"):
        batches(opened_images(spotted), 10)
    with pytest.raises(UserError, match=r"2 bad records to 40 examples"):
        opened_images(spotted, bad_most=0.04)(0, 5)  # 5 and 6 follow each other
    examples = opened_images(spotted, bad_most=3 / 40)
    batches(examples, 50)  # 200 examples, 15 bad ones
    assert examples.counters()["bad_records"] == 15
    with pytest.raises(UserError, match="bad records to 40 examples"):
        batches(opened_images(spotted, bad_most=2 / 40), 10)


def test_all_bad(tmp_path):
    path = write_images(tmp_path / "set", {str(i): b"no image" for i in range(9)})
    with pytest.raises(UserError, match="10 bad records to 9 examples"):
        batches(opened_images(path, bad_most=1.0), 1)


def test_a_training_run_logs_them(spotted, tmp_path, capfd):
    settings = dict(
        total="10 steps", batch_size=8, log_every=1,
        model=data.TINY | {"depth": 1, "decoder_depth": 1},
        data={"path": str(spotted), "targets": "pixels", "bad_most": 0.1, "threads": 2},
        loss={"visible": 0.0}, checkpoint={"every": "100%"}, optim={"warmup": "1 steps"},
    )  # fmt: skip
    assert train.train(schema.parse(Train, settings), tmp_path / "run") == 0
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [line["bad_records"] for line in lines if "loss" in line]
    assert counts == sorted(counts) and counts[-1] >= 2 * len(BAD) and counts[0] < counts[-1]
    said = capfd.readouterr().err
    assert all(said.count(f"({index}.jpg)") == 1 for index in BAD)


def test_a_store_cannot_leave_any_out(spotted, tmp_path):
    with pytest.raises(UserError) as caught:
        data.token_store(tmp_path, spotted, data.random_teacher(tmp_path / "teacher"))
    line = str(caught.value)
    assert re.search(r"'train'\): example \d+ \(\d+.jpg\): .*tools/import_images.py", line)
    assert not token_store.exists(tmp_path / "tokens") and "\n" not in line


@pytest.mark.parametrize(
    "text,said",
    [
        ("config.data.bad_records=warn", "must be one of None, error, skip, got 'warn'"),
        (
            "config.data.bad_most=1.5",
            "config.data.bad_most must be at least 0 and at most 1, got 1.5",
        ),
        ("config.data.bad_most=-1", "at least 0 and at most 1, got -1.0"),
    ],
)
def test_settings(text, said):
    config = schema.default(Train)
    config.data.path = "somewhere"
    with pytest.raises(UserError, match=said):
        schema.override(config, Train, *text.split("="))
        parse(Train, config)
    assert parse(Tokens, {"source": "x"})
