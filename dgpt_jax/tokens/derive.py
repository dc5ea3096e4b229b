"""Writes token stores whose records are copied, byte by byte, from other stores.

Like a build: a shard appears when it is complete, an interrupted command resumes and the result is
the same, byte by byte. Memory per example: 28 bytes of store_parts.Index, and 8 of its row.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax import invocation
from dgpt_jax._version import __version__
from dgpt_jax.data import teacher_info, token_statistics, token_store
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import UserError, counted
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import array_record_shards, disk_space, tfds_dataset
from dgpt_jax.storage.array_record_shards import ShardInfo
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.tokens.store_parts import Part, key_of, names_of, records
from dgpt_jax.tokens.workers import Workers

SAY_EVERY = 10  # seconds
RECORD_OVERHEAD = 80  # bytes of a record in a shard besides itself; its blocks' headers add 0.04 %
SHARD_OVERHEAD = 1 << 17  # bytes: a shard is padded to 64 KiB


@dataclass(frozen=True)
class Derived:
    """A store to be written: the examples of `parts`, in order."""

    out: epath.Path
    info: StoreInfo
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def views(self) -> int:
        return len(self.parts[0].store.splits)


@dataclass(frozen=True)
class Shard:
    """One shard to be written: a view of some examples."""

    target: Derived
    path: epath.Path
    view: int
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def bytes(self) -> int:
        """Returns its size on disk, if the records of its view are as large as those of view 0."""
        sizes = sum(int(part.index.sizes[part.rows].sum(dtype=np.int64)) for part in self.parts)
        return round(sizes * 1.0004) + RECORD_OVERHEAD * len(self) + SHARD_OVERHEAD


def describe(
    info: StoreInfo, out: AnyPath, parts: Sequence[Part], source: Mapping[str, Any], **how: Any
) -> StoreInfo:
    """Returns the metadata of a store of `parts`: those of `info`, of another source.

    source: name, version and split. how: how it was derived. The source's digest identifies the
    records: which, and of what contents.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update("\n".join(split.digest for split in part.store.splits).encode())
        digest.update(part.rows.tobytes())
    sizes = [part.index.sizes[part.rows] for part in parts]
    return dataclasses.replace(
        info,
        name=tfds_dataset.dataset_name(out),
        example_bytes=float(np.mean(np.concatenate(sizes))) + RECORD_OVERHEAD,
        source=dict(source)
        | {
            "examples": sum(len(part.rows) for part in parts),
            "digest": digest.hexdigest()[:16],
            "derived": how | {"from": [part.store.identity() for part in parts]},
        },
        command=invocation.command_line(),
        code_version=__version__,
    )


def write(
    targets: Sequence[Derived],
    workers: Workers,
    *,
    check: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the missing shards of stores, then their metadata.

    check: verifies existing shards by checksum; default: by size. Raises UserError, if possible
    before anything is written.
    """
    targets = [_same_or_new(target) for target in targets]
    todo = [shard for target in targets for shard in _unfinished(target, check, say)]
    total, missing = sum(len(t) * t.views for t in targets), sum(map(len, todo))
    if missing < total:
        say(f"complete: {total - missing} of {counted(total, 'record')}")
    needed = sum(shard.bytes() for shard in todo)
    disk_space.require(targets[0].out, needed, "free some, or choose another OUT")
    for target in targets:
        _begin(target)
    if missing:
        say(f"{disk_space.size(needed)} to write")
        _write_shards(todo, missing, workers, say)
    for target in targets:
        if any(shard.target is target for shard in todo) or not _is_finished(target.out):
            _finish(target)


def _same_or_new(target: Derived) -> Derived:
    """Returns the target, as begun if its directory has a part of it. Raises UserError if it has
    anything else, or is one of the sources."""
    out = target.out
    for part in target.parts:
        if os.path.realpath(part.store.path) == os.path.realpath(out):
            raise UserError(f"{out} is a source itself: choose another OUT")
    if not token_store.exists(out):
        names = array_record_shards.sizes(out) if out.exists() else {}
        if other := [n for n in names if "array_record" in n or n == "dataset_info.json"]:
            raise UserError(f"{out} already contains a dataset ({other[0]}): choose another OUT")
        return target
    stored = StoreInfo.load(out)
    free = {"name": "", "command": "", "code_version": "", "format": 0}
    saved, new = (dataclasses.asdict(i) | free for i in (stored, target.info))
    if saved != new:
        raise UserError(
            f"{out} holds a store of another selection or of other sources, by {stored.command}: "
            f"repeat that, or choose another OUT"
        )
    return dataclasses.replace(target, info=stored)


def _plan_view(target: Derived, view: int) -> list[Shard]:
    size = target.info.views.get("shard_size") or target.parts[0].store.shard_size
    starts = range(0, len(target), size)
    return [
        Shard(
            target,
            tfds_dataset.shard_path(
                target.out, token_store.view_split(view), i, len(starts), target.info.name
            ),
            view,
            tuple(_slice(target.parts, start, start + size)),
        )
        for i, start in enumerate(starts)
    ]


def _slice(parts: Sequence[Part], start: int, stop: int) -> Iterator[Part]:
    """Yields what parts hold of the examples start…stop of all."""
    for part in parts:
        if len(rows := part.rows[max(start, 0) : max(stop, 0)]):
            yield dataclasses.replace(part, rows=rows)
        start, stop = start - len(part.rows), stop - len(part.rows)


def _unfinished(target: Derived, check: bool, say: Callable[[str], None]) -> list[Shard]:
    """Returns the shards that are missing or damaged."""
    planned = [s for view in range(target.views) for s in _plan_view(target, view)]
    infos = array_record_shards.shard_infos(target.out)
    with Workers(8) as pool:
        damaged = array_record_shards.damaged(target.out, infos, pool.pool, check=check)
    todo = []
    for shard in planned:
        info = infos.get(shard.path.name)
        if info is not None and (shard.path.name in damaged or info.records != len(shard)):
            say(f"{shard.path.name} is damaged and will be written again")
            array_record_shards.invalidate(shard.path)
            info = None
        todo += [shard] * (info is None)
    return todo


def _begin(target: Derived) -> None:
    """Creates the directory; writes the metadata, so that another selection is not mixed in."""
    target.out.mkdir(parents=True, exist_ok=True)
    array_record_shards.remove_partial_files(target.out)
    if not token_store.exists(target.out):
        if target.info.teacher.is_reduced:
            teacher_info.copy_basis(target.parts[0].store.path, target.out)
        target.info.save(target.out)


def _write_shards(
    todo: Sequence[Shard], total: int, workers: Workers, say: Callable[[str], None]
) -> None:
    """Writes shards in the order of the list, one per thread at a time."""
    shown, done = progress.Progress("records", SAY_EVERY, say=say), 0
    clock = progress.Clock(0, total, 1)

    def write_shard(shard: Shard) -> ShardInfo:
        return array_record_shards.write(shard.path, workers.until_stopped(_records(shard)))

    for shard, info in workers.each(write_shard, todo):
        if info.records != len(shard):
            raise UserError(f"{shard.path} has {info.records} records, not {len(shard)}")
        done += len(shard)
        if shown.is_due() or done == total:
            values = clock.read(done)
            rate, eta = values["images_per_second"], progress.duration(values["eta_seconds"])
            shown.show(done, total, f"({done / total:.1%}), {rate:.0f} records/s, eta {eta}")
    shown.close()


def _records(shard: Shard) -> Iterator[bytes]:
    """Yields the records of a shard. Raises UserError if a view has other ids than view 0."""
    for part in shard.parts:
        rows, view = part.rows, shard.view
        examples = records(part.store, view, rows)
        for row, (record, name, _) in zip(rows, examples, strict=True):
            if key_of(name) != part.index.keys[row]:
                (expected,) = names_of(part.store, [row])
                raise UserError(
                    f"{part.store.path}: example {row} of {part.store.splits[view].split} is "
                    f"{name.decode()}, that of view000 {expected}: build the store again"
                )
            yield record


def _is_finished(out: epath.Path) -> bool:
    """True if a store has the metadata that are written last."""
    names = (array_record_shards.MANIFEST, "dataset_info.json")
    return all((out / name).exists() for name in names)


def _finish(target: Derived) -> None:
    """Writes the manifest and TFDS's metadata."""
    infos = array_record_shards.shard_infos(target.out)
    written = {
        token_store.view_split(view): [infos[s.path.name] for s in _plan_view(target, view)]
        for view in range(target.views)
    }
    array_record_shards.write_manifest(target.out, infos)
    features = target.parts[0].store.features
    tfds_dataset.write_metadata(target.out, features, written, target.info.name)
    codec = target.info.teacher.load_codec(target.out)
    token_statistics.measure_store(target.out, token_store.view_split(0), codec)
