"""Ids of examples: by field."""

from dgpt_jax.storage import example_ids


def test_ids():
    assert example_ids.of_example({"id": b"x"}) == "x"
    assert example_ids.of_example({"file_name": "n01.JPEG"}) == "n01.JPEG"
    assert example_ids.of_example({"image": b"abc"}) == "352441c2"
