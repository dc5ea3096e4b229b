"""Temporary directories are gone at the end, also while other threads still write there."""

import threading
import time

import pytest

from dgpt_jax.storage import scratch_dir


def test_a_directory_is_removed_that_late_writers_create_again(tmp_path):
    def write_late():
        for number in range(20):
            nested = directory / "checkpoints" / str(number)
            nested.mkdir(parents=True, exist_ok=True)
            (nested / "data").write_bytes(b"late")
            time.sleep(0.02)

    directory = tmp_path / "staging"
    directory.mkdir()
    writer = threading.Thread(target=write_late)
    with pytest.raises(OSError, match="full"), scratch_dir.removed(directory):
        writer.start()
        raise OSError("the disk is full")
    writer.join()
    assert not list(tmp_path.iterdir())


def test_a_directory_is_removed_without_an_error(tmp_path):
    (tmp_path / "staging").mkdir()
    with scratch_dir.removed(tmp_path / "staging"):
        (tmp_path / "staging/a").write_bytes(b"a")
    assert not list(tmp_path.iterdir())
