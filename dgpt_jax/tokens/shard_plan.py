"""Shards of a token store that are to be written, and those that are complete."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from etils import epath

from dgpt_jax.data import token_store
from dgpt_jax.distributed import multihost
from dgpt_jax.storage import array_record_shards, disk_space, tfds_dataset


@dataclass(frozen=True)
class ShardPlan:
    """One shard of a store: a view of a range of examples."""

    path: epath.Path
    view: int
    indices: range


def plan_view(
    directory: epath.Path, name: str, view: int, examples: int, shard_size: int
) -> list[ShardPlan]:
    """Returns the shards of a view, in order; name: prefix of their files."""
    split, starts = token_store.view_split(view), range(0, examples, shard_size)
    return [
        ShardPlan(
            tfds_dataset.shard_path(directory, split, i, len(starts), name),
            view,
            range(start, min(start + shard_size, examples)),
        )
        for i, start in enumerate(starts)
    ]


def unfinished(
    directory: epath.Path,
    planned: Sequence[ShardPlan],
    pool,
    say: Callable[[str], None],
    *,
    check: bool,
) -> list[ShardPlan]:
    """Returns the missing and the damaged shards, the same list on every process; each process
    verifies its share of the existing ones, by size, with `check` also by checksum."""
    infos = array_record_shards.shard_infos(directory)
    existing = [shard for shard in planned if shard.path.name in infos]
    mine = {s.path.name: s for s in existing[jax.process_index() :: jax.process_count()]}
    if check and mine:
        say(f"reading {len(existing)} existing shards …")
    damaged = array_record_shards.damaged(
        directory, {name: infos[name] for name in mine}, pool, check=check
    )
    for name, shard in mine.items():
        if name in damaged or infos[name].records != len(shard.indices):
            say(f"{name} is damaged and will be rebuilt")
            array_record_shards.invalidate(shard.path)
    multihost.barrier("checked")
    infos = array_record_shards.shard_infos(directory)
    multihost.barrier("listed")
    return [shard for shard in planned if shard.path.name not in infos]


def require_disk_space(
    directory: epath.Path,
    example_bytes: float,
    todo: Sequence[ShardPlan],
    say: Callable[[str], None],
    remedy: str,
) -> None:
    """Logs the size of the missing shards. Raises UserError if the disk has less free."""
    needed = round(example_bytes * sum(len(shard.indices) for shard in todo))
    free = disk_space.free_bytes(directory)
    room = "" if free is None else f", {disk_space.size(free)} free"
    say(f"{disk_space.size(needed)} to write{room}")
    disk_space.require(directory, needed, remedy)
