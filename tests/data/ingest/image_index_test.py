"""Index of millions of images: memory, order and digest."""

import gc
import random
import tracemalloc

import pytest

from dgpt_jax.data.ingest import discovery, image_index, layout

COUNT = 50_000


def build_index(paths):
    builder = image_index.ImageIndexBuilder(lambda _: None)
    for i, path in enumerate(paths):
        builder.add(path, b"/src", offset=512 * i, size=100)
    return builder.build()


def many(count):
    return (b"n%08d/a_name_of_an_image_%09d.JPEG" % (i * 7919 % 1000, i) for i in range(count))


@pytest.fixture
def traced():
    """Function that returns (current, peak) bytes allocated since the test began."""
    gc.collect()
    tracemalloc.start()
    yield tracemalloc.get_traced_memory
    tracemalloc.stop()


def test_memory_with_a_long_path(traced):
    """Paths of 44 bytes, 40 more for each, twice while sorting."""
    long = b"n%08d/" % 5 + b"x" * 4000 + b".JPEG"
    index = build_index(path for paths in (many(COUNT), [long]) for path in paths)
    assert traced()[0] < 100 * COUNT
    index = layout.sorted_unique(index)
    assert traced()[0] < 100 * COUNT
    assert traced()[1] < 250 * COUNT
    assert index.paths[6 * (COUNT // 1000)] == long and len(index) == COUNT + 1


def test_sorting_and_prefixes():
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
        index = build_index(shuffled).sorted()
        assert list(index.paths) == expected == [index.paths[i] for i in range(len(index))]
        assert [shuffled[offset // 512] for offset in index.offset] == expected
    subset = index.take(index.top_dirs()[0] == index.top_dirs()[1].index(b"a")).strip_prefix(b"a")
    assert list(subset.paths) == [b"1/x.jpg", b"10.jpg", b"2.jpg", b"\xff.jpg"]
    assert subset[0].id == "1/x.jpg" and subset.top_dirs()[1] == [b"1", b""]


def test_digests_of_earlier_versions(tmp_path):
    """Recorded in import.json of imports that resume."""
    for name in ("train/a/1.jpg", "train/b/a long name.jpg", "val/a/3.jpg", "val/b/4.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(len(name)))
    assert discovery.discover(tmp_path).digest() == "280ce93776f6e7c0"
    assert discovery.discover(tmp_path / "train").digest() == "e2763ad03171c9c9"
