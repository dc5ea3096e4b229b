"""Listings of gs:// and s3:// by pages, so that a bucket of millions of objects fits in memory.

fsspec's own listings keep a dictionary of some 1 kB per object until the last page has come.
"""

from collections.abc import Iterator
from typing import Any

from dgpt_jax.storage import gcs

PAGE = 1000  # objects; the most that both services allow


def files(url: str) -> Iterator[tuple[str, int]]:
    """Yields (path below the URL, bytes) of all objects below a directory, at any depth, sorted by
    path on gs:// and s3://. Raises UserError."""
    gcs.require(url)
    with gcs.failures(f"{url} cannot be listed"):
        system, root = gcs.filesystem(url)
        root = root.rstrip("/") + "/"
        pages = PAGES.get(url.partition("://")[0], _folders)
        for name, size in pages(system, root):
            if not name.endswith("/"):  # the marker of an empty folder
                yield name[len(root) :], size


def _gcs_pages(system: Any, root: str) -> Iterator[tuple[str, int]]:
    bucket, _, prefix = root.partition("/")
    token = None
    while True:
        page = system.call(
            "GET", "b/{}/o", bucket, prefix=prefix, pageToken=token, maxResults=PAGE,
            fields="nextPageToken,items(name,size)", json_out=True,
        )  # fmt: skip
        for item in page.get("items", ()):
            yield f"{bucket}/{item['name']}", int(item["size"])
        token = page.get("nextPageToken")
        if not token:
            return


def _s3_pages(system: Any, root: str) -> Iterator[tuple[str, int]]:
    bucket, _, prefix = root.partition("/")
    more: dict[str, str] = {}
    while True:
        page = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=PAGE, **more)
        for item in page.get("Contents", ()):
            yield f"{bucket}/{item['Key']}", int(item["Size"])
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _folders(system: Any, root: str) -> Iterator[tuple[str, int]]:
    """Other file systems: folder by folder."""
    root = root.rstrip("/")
    for folder, _, entries in system.walk(root, detail=True):
        for name, entry in sorted(entries.items()):
            yield f"{folder}/{name}", int(entry["size"])


PAGES = {"gs": _gcs_pages, "gcs": _gcs_pages, "s3": _s3_pages}
