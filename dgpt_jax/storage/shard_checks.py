"""Completeness of a split's shards, and a digest of their contents."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards
from dgpt_jax.storage.array_record_shards import ShardInfo
from dgpt_jax.storage.shard_records import Shard


def require_complete(
    directory: str,
    lengths: Mapping[str, int],
    sizes: Mapping[str, int],
    manifest: Mapping[str, ShardInfo],
    *,
    local: bool,
) -> None:
    """Raises UserError unless every shard exists and is complete.

    lengths: {file name: records} by the metadata. sizes: {file name: bytes} of the directory. Sizes
    are compared with the manifest. Local shards not in it are opened; remote ones, only once they
    are fetched.
    """
    for name in lengths:
        if name not in sizes:
            raise UserError(f"{directory}/{name} is missing")

    def check(name: str) -> None:
        _check(f"{directory}/{name}", lengths[name], sizes[name], manifest.get(name), local)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, lengths))


def _check(path: str, length: int, size: int, info: ShardInfo | None, local: bool) -> None:
    if info is not None and info.bytes == size:
        records = info.records
    else:
        records = array_record_shards.count(path) if local else length
    if records != length:
        raise UserError(f"{path} has {records} records, the metadata say {length}")
    if info is not None and info.bytes != size:
        raise UserError(
            f"{path} has {size} bytes, {array_record_shards.MANIFEST} says {info.bytes}: the "
            f"file was replaced"
        )


def digest(shards: Sequence[Shard], manifest: Mapping[str, ShardInfo]) -> str:
    """Returns 16 hexadecimal digits that identify the contents of shards, in order: from their
    checksums, or from their sizes if they are not in the manifest."""
    sha = hashlib.sha256()
    for shard in shards:
        info = manifest.get(os.path.basename(shard.filename))
        content = info.crc32 if info else shard.bytes
        sha.update(f"{shard.skip} {shard.take} {content}\n".encode())
    return sha.hexdigest()[:16]
