"""Output to gs://, with a store in memory in the bucket's place."""

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from dgpt_jax import gcs, images
from dgpt_jax.schema import UserError
from tests.data import write_folder


class Bucket(MemoryFileSystem):
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")


@pytest.fixture
def bucket(monkeypatch) -> Bucket:
    made, local = Bucket(), backend.fsspec_backend.fs
    monkeypatch.setattr(
        backend.fsspec_backend, "fs", lambda path: made if str(path)[:5] == "gs://" else local(path)
    )
    monkeypatch.setattr(gcs, "filesystem", lambda path: (made, made._strip_protocol(path)))
    made.mkdirs("/bucket")
    yield made
    made.store.clear()


def test_an_import_to_a_bucket(tmp_path, bucket):
    """The files of a local one; what is missing is written again."""
    src, out, said = tmp_path / "src", "gs://bucket/out", []
    write_folder(src, 5)
    (src / "a/000.png").write_text("no image")
    report = images.import_images(src, tmp_path / "out", shard_size=4, say=said.append)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stored():
        return {name.rpartition("/")[2]: data.getvalue() for name, data in bucket.store.items()}

    for gone in ((), ("dataset_info.json",), ("manifest.json", "00001-of-00003")):
        for name in [name for name in bucket.store if name.endswith(gone)]:
            del bucket.store[name]
        assert images.import_images(src, out, shard_size=4, say=said.append) == report
        assert stored() == expected
    with pytest.raises(UserError, match="gs://bucket/out was begun with shard_size 4, now it is 5"):
        images.import_images(src, out, shard_size=5)


def test_without_the_client(tmp_path, monkeypatch):
    def fs(path):
        raise ImportError("install gcsfs")

    monkeypatch.setattr(backend.fsspec_backend, "fs", fs)
    with pytest.raises(UserError, match="gs://bucket/out cannot be opened: install gcsfs"):
        images.import_images(tmp_path, "gs://bucket/out")
