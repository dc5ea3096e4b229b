"""Sources on gs:// and s3://, fake servers on loopback: the same dataset as of local files."""

import functools
import importlib
import urllib.request
import zipfile

import pytest

from dgpt_jax.data.ingest import discovery, importer
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges, remote_listing
from tests.support import gcs, image_forms

PAGE = 7  # objects of a listing


@functools.cache
def images():
    return image_forms.samples(30)


class GoogleStorage:
    """A bucket on gs://."""

    def __init__(self, monkeypatch):
        retry = importlib.import_module("gcsfs.retry")  # configured by dgpt_jax.storage.gcs
        monkeypatch.setattr(retry, "min", lambda *_: 0.01, raising=False)  # its delays
        self.server = gcs.Server().__enter__()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", self.server.url)
        self.url = f"gs://{gcs.BUCKET}"
        self.close = functools.partial(self.server.__exit__, None, None, None)

    def put(self, name: str, content: bytes):
        self.server.objects[name] = content


class AmazonS3:
    """A bucket on s3://."""

    def __init__(self, monkeypatch):
        import s3fs
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        self.close = server.stop
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()  # of earlier tests
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        self._system = s3fs.S3FileSystem()
        self._system.mkdir("bucket")
        self.url = "s3://bucket"

    def put(self, name: str, content: bytes):
        self._system.pipe_file(f"bucket/{name}", content)


@pytest.fixture(params=[GoogleStorage, AmazonS3])
def bucket(request, monkeypatch):
    monkeypatch.setattr(remote_listing, "PAGE", PAGE)
    bucket = request.param(monkeypatch)
    yield bucket
    bucket.close()


FORMS = {
    "folder": lambda d: image_forms.write_folder(d, images()),
    "zip": lambda d: image_forms.write_zip(d / "x.zip", images(), zipfile.ZIP_DEFLATED),
    "parquet": lambda d: image_forms.write_parquet(d / "data", images(), 3, rows=4).parent,
    "webdataset": lambda d: image_forms.write_shards(d, images()),
    "tfrecord": lambda d: image_forms.write_tfrecord(d / "my_set", images()).parent,
    "pattern": lambda d: f"{image_forms.write_shards(d, images())}/{{00000..00002}}.tar",
}


def import_all(src, out):
    return importer.import_images(src, out, shard_size=7, say=lambda _: None)


def shards_of(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*array_record*")}


def test_forms_on_a_bucket(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(byte_ranges, "BLOCK", 3000)
    for form, write in FORMS.items():
        root = tmp_path / form.replace(" ", "_")
        local = str(write(root / "src"))
        for path in (root / "src").rglob("*"):
            if path.is_file():
                name = f"{root.name}/{path.relative_to(root).as_posix()}"
                bucket.put(name, path.read_bytes())
        remote = local.replace(str(tmp_path), bucket.url)
        expected = import_all(local, root / "local/out")
        report = import_all(remote, root / "remote/out")
        assert report.examples == expected.examples == {"train": 30}, form
        assert report.classes == expected.classes == list(image_forms.CLASSES), form
        assert shards_of(root / "remote/out") == shards_of(root / "local/out"), form


def test_a_folder_is_listed_by_pages(bucket):
    for i in range(3 * PAGE + 1):
        bucket.put(f"many/{i % 2}/{i:03d}.png", b"x")
    bucket.put("many/.hidden/x.png", b"x")
    bucket.put("many/0/", b"")
    listed = list(remote_listing.files(f"{bucket.url}/many"))
    assert len(listed) == 3 * PAGE + 2 and ("0/000.png", 1) in listed
    discovered = discovery.discover(f"{bucket.url}/many/")
    assert discovered.classes == ["0", "1"]
    assert [x.id for x in discovered.splits["train"]][:2] == ["0/000.png", "0/002.png"]
    assert len(discovered.splits["train"]) == 3 * PAGE + 1


def test_missing_sources_on_a_bucket(bucket):
    bucket.put("shards/00000.tar", b"x")
    for source, message in (
        ("absent", "no such file or directory: .*absent"),
        ("shards/{00000..00001}.tar", "00001.tar and 0 other"),
        ("shards/{00002..00003}.tar", "matches no file"),
        ("shards/00000.tar", "00000.tar is truncated"),
    ):
        with pytest.raises(UserError, match=message):
            discovery.discover(f"{bucket.url}/{source}")
