"""Imports to gs://, replaced by an in-memory file system."""

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from dgpt_jax.data.ingest import importer
from dgpt_jax.errors import UserError
from dgpt_jax.storage import gcs
from tests.support.data import write_folder


class Bucket(MemoryFileSystem):
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")


@pytest.fixture
def bucket(monkeypatch) -> Bucket:
    remote, local = Bucket(), backend.fsspec_backend.fs
    monkeypatch.setattr(
        backend.fsspec_backend,
        "fs",
        lambda path: remote if str(path)[:5] == "gs://" else local(path),
    )
    monkeypatch.setattr(gcs, "filesystem", lambda path: (remote, remote._strip_protocol(path)))
    remote.mkdirs("/bucket")
    yield remote
    remote.store.clear()


def test_an_import_to_a_bucket(tmp_path, bucket):
    """Writes the same files as a local one; writes missing ones again."""
    src, out, lines = tmp_path / "src", "gs://bucket/out", []
    write_folder(src, 5)
    (src / "a/000.png").write_text("no image")
    report = importer.import_images(src, tmp_path / "out", shard_size=4, say=lines.append)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stored():
        return {name.rpartition("/")[2]: data.getvalue() for name, data in bucket.store.items()}

    for missing in ((), ("dataset_info.json",), ("manifest.json", "00001-of-00003")):
        for name in [name for name in bucket.store if name.endswith(missing)]:
            del bucket.store[name]
        assert importer.import_images(src, out, shard_size=4, say=lines.append) == report
        assert stored() == expected
    with pytest.raises(UserError, match="gs://bucket/out .*shard_size 4.* 5"):
        importer.import_images(src, out, shard_size=5)


def test_a_missing_client_is_reported(tmp_path, monkeypatch):
    def fs(path):
        raise ImportError("install gcsfs")

    monkeypatch.setattr(backend.fsspec_backend, "fs", fs)
    with pytest.raises(UserError, match="gs://bucket/out .*install gcsfs"):
        importer.import_images(tmp_path, "gs://bucket/out")
