"""Lists of millions of images: their memory, order and digest."""

import gc
import random
import tracemalloc

import pytest

from dgpt_jax import image_files, members

COUNT = 50_000


def gathered(paths):
    columns = members.Columns(lambda _: None)
    for i, path in enumerate(paths):
        columns.add(path, b"/src", offset=512 * i, size=100)
    return columns.members()


def many(count):
    return (b"n%08d/a_name_of_an_image_%09d.JPEG" % (i * 7919 % 1000, i) for i in range(count))


@pytest.fixture
def traced():
    """A function: bytes allocated since the test began, (now, at most)."""
    gc.collect()
    tracemalloc.start()
    yield tracemalloc.get_traced_memory
    tracemalloc.stop()


def test_a_long_path_widens_no_other(traced):
    """Paths of 44 bytes: 40 more for each, twice where they are brought into order."""
    long = b"n%08d/" % 5 + b"x" * 4000 + b".JPEG"
    found = gathered(path for part in (many(COUNT), [long]) for path in part)
    assert traced()[0] < 100 * COUNT
    found = image_files._in_order(found)
    assert traced()[0] < 100 * COUNT
    assert traced()[1] < 250 * COUNT
    assert found.paths[6 * (COUNT // 1000)] == long and len(found) == COUNT + 1


def test_order_and_rests_of_paths():
    """By first folder, then path; as bytes, so that "a-b/" comes after "a/" though "-" < "/"."""
    paths = [
        b"a/2.jpg", b"a-b/1.jpg", b"b/1.jpg", b"a/\xff.jpg", b"a/10.jpg", b"a/1/x.jpg", b"top.jpg",
        b"B/1.jpg",
    ]  # fmt: skip
    expected = [
        b"top.jpg", b"B/1.jpg", b"a/1/x.jpg", b"a/10.jpg", b"a/2.jpg", b"a/\xff.jpg",
        b"a-b/1.jpg", b"b/1.jpg",
    ]  # fmt: skip
    for seed in range(5):
        shuffled = random.Random(seed).sample(paths, len(paths))
        found = gathered(shuffled).sorted()
        assert list(found.paths) == expected == [found.paths[i] for i in range(len(found))]
        assert [shuffled[offset // 512] for offset in found.offset] == expected
    part = found.take(found.tops()[0] == found.tops()[1].index(b"a")).below(b"a")
    assert list(part.paths) == [b"1/x.jpg", b"10.jpg", b"2.jpg", b"\xff.jpg"]
    assert part[0].id == "1/x.jpg" and part.tops()[1] == [b"1", b""]


def test_the_digest_of_imports_begun_before(tmp_path):
    """It stands in import.json of imports that resume."""
    for name in ("train/a/1.jpg", "train/b/a long name.jpg", "val/a/3.jpg", "val/b/4.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(len(name)))
    assert image_files.find(tmp_path).digest() == "280ce93776f6e7c0"
    assert image_files.find(tmp_path / "train").digest() == "e2763ad03171c9c9"
