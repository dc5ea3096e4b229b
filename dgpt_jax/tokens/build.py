"""Token stores: views of an image dataset, and what the teacher makes of them.

The teacher runs on exactly the picture that is stored, decoded again from its stored bytes, so that
picture and tokens cannot drift apart. Each process builds its part of the unfinished shards with
its own devices and waits for the others only before the first and after the last.
"""

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from etils import epath

import dgpt_jax
from dgpt_jax import hosts, progress, records, shards, token_codec, token_store, token_writer
from dgpt_jax.config import Tokens
from dgpt_jax.schema import UserError
from dgpt_jax.teacher import Teacher
from dgpt_jax.token_store import StoreInfo
from dgpt_jax.token_writer import Shard

SAMPLE = 256  # pictures that the codec and the stored cosine are measured on


def build(config: Tokens, out, *, check: bool = False) -> StoreInfo:
    """Writes the missing shards of a token store, then its metadata. Raises UserError.

    Shards of the size in their receipts are kept, so a rerun continues, and more views can be added
    later; with `check` they are read, and their checksums must be right, too. The store is the same
    for any number of processes and devices.
    """
    out = epath.Path(out)
    say = progress.Progress().say
    source = records.Split(config.source, config.split)
    teacher = Teacher(config.teacher, config.batch_size, config.tensor)
    for line in (*teacher.notes, *hosts.preflight(out, teacher.mesh)):
        say(line)
    with ThreadPoolExecutor(config.threads) as pool:
        if jax.process_index() == 0:
            out.mkdir(parents=True, exist_ok=True)
            shards.sweep(out)
            _open_or_begin(config, out, source, teacher, pool)
        hosts.barrier("begun")
        info = StoreInfo.load(out)
        planned = [s for v in range(config.views) for s in _shards_of(config, out, info, v)]
        todo = _unfinished(out, planned, pool, say, check=check)
        kept = sum(len(s.indices) for s in planned) - sum(len(s.indices) for s in todo)
        say(f"{kept} of {len(source) * config.views} examples are there and whole")
        _check_space(out, info, todo, say)
        mine = todo[jax.process_index() :: jax.process_count()]
        codec = info.load_codec(out)
        token_writer.write(config, source, teacher, info, codec, mine, pool, say)
    hosts.barrier("written")
    if jax.process_index() == 0:
        _finish(config, out, info, source)
    hosts.barrier("finished")
    return info


def _shards_of(config: Tokens, out, info: StoreInfo, view: int) -> list[Shard]:
    examples = info.source["examples"]
    starts = range(0, examples, config.shard_size)
    return [
        Shard(
            records.shard_path(out, token_store.view_split(view), i, len(starts), info.name),
            view,
            range(start, min(start + config.shard_size, examples)),
        )
        for i, start in enumerate(starts)
    ]


def _open_or_begin(config: Tokens, out, source, teacher: Teacher, pool):
    """Sees that what is there is of the same kind, or writes what the store will be."""
    if not token_store.exists(out):
        info, basis = _describe(config, out, source, teacher, pool)
        if basis is not None:
            with (out / token_store.BASIS_FILE).open("wb") as file:
                np.save(file, basis)
        info.save(out)  # before the shards: a rerun with another config must not mix with them
        return
    old = StoreInfo.load(out)
    if "digest" not in old.source:  # of an earlier version: what is there now is taken for it
        old = dataclasses.replace(old, source=old.source | {"digest": source.digest})
    kept = {
        "codec": config.codec,
        "picture_size": config.picture_size,
        "picture": config.picture,
        "source": _source(config, source),
        "views": _views(config),
    }
    for name, value in kept.items():
        if getattr(old, name) != value:
            raise UserError(
                f"{out} was built with {name} {getattr(old, name)}, the config has {value}: choose "
                f"another --out"
            )
    if config.pca != (old.width if old.is_reduced else None):
        raise UserError(
            f"{out} has tokens of width {old.width}, and config.pca is {config.pca}: choose "
            f"another --out"
        )
    for name in ("hash", "dtype", "tower"):
        if old.teacher[name] != (new := _json(teacher.describe()))[name]:
            raise UserError(
                f"{out} was built with the teacher {old.teacher['name']} ({name} "
                f"{old.teacher[name]}), the config names {new['name']} ({name} {new[name]})"
            )


def _describe(config: Tokens, out, source, teacher: Teacher, pool):
    """(StoreInfo, PCA's basis or None), measured on a sample of view 0."""
    sample = range(0, len(source), max(1, len(source) // SAMPLE))[:SAMPLE]
    rendered = list(pool.map(lambda i: token_writer.render(config, source, 0, i), sample))
    tokens = teacher(np.stack([r.picture for r in rendered]))
    token_writer.refuse_unless(np.isfinite(tokens).all())
    codec, variance = _codec(config, tokens)
    stored = codec.encode(tokens)
    cosine = token_codec.cosines(codec.decode(stored), codec.project(tokens))
    info = StoreInfo(
        name=records.dataset_name(out),
        codec=config.codec,
        grid=teacher.tower.grid,
        cls=teacher.tower.cls,
        width=config.pca or teacher.tower.token_width,
        channel_scale=tuple(float(s) for s in codec.scale),
        cosine=(float(cosine.min()), float(cosine.mean())),
        variance=variance,
        example_bytes=stored[0].nbytes
        + float(np.mean([len(r.data) for r in rendered]))
        + token_writer.OVERHEAD,
        picture_size=config.picture_size,
        picture=config.picture,
        teacher=_json(teacher.describe()),
        source=_source(config, source),
        views=_views(config),
        command=shlex.join(["python", *sys.argv]),
        code_version=dgpt_jax.__version__,
    )
    return info, codec.basis


def _codec(config: Tokens, tokens: np.ndarray):
    """(Codec, share of the variance it keeps), measured on tokens or that of config.like."""
    if not config.like:
        return token_codec.fit(tokens, config.codec, config.pca)
    other = StoreInfo.load(config.like)
    has = (other.codec, other.width if other.is_reduced else None)
    if has != (config.codec, config.pca) or other.teacher["width"] != tokens.shape[-1]:
        raise UserError(
            f"config.like {config.like} has codec, pca = {has} of {other.teacher['width']} "
            f"channels, the config {(config.codec, config.pca)} of {tokens.shape[-1]}"
        )
    codec = other.load_codec(config.like)
    kept = np.square(codec.project(tokens), dtype=np.float64).sum()
    return codec, float(kept / np.square(tokens, dtype=np.float64).sum())


def _json(value):
    """As JSON will give it back."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _source(config: Tokens, source: records.Split) -> dict:
    info = records.open_builder(config.source).info
    named = {"name": info.name, "version": str(info.version), "split": config.split}
    return named | {"examples": len(source), "digest": source.digest}


def _views(config: Tokens) -> dict:
    names = ("seed", "crop_scale", "crop_ratio", "flip", "shard_size")
    return {name: _json(getattr(config, name)) for name in names}


def _unfinished(out, planned: Sequence[Shard], pool, say, *, check: bool) -> list[Shard]:
    """Shards without a receipt, or which are damaged by it; the same list on every process. Each
    looks at its part of what is there."""
    known = shards.receipts(out)
    there = [shard for shard in planned if shard.path.name in known]
    mine = {s.path.name: s for s in there[jax.process_index() :: jax.process_count()]}
    if check and mine:
        say(f"reading {len(there)} shards that are there …")
    damaged = shards.damaged(out, {name: known[name] for name in mine}, pool, check=check)
    for name, shard in mine.items():
        if name in damaged or known[name].records != len(shard.indices):
            say(f"{name} is damaged: it is built again")
            shards.forget(shard.path)
    hosts.barrier("checked")
    known = shards.receipts(out)
    hosts.barrier("listed")
    return [shard for shard in planned if shard.path.name not in known]


def _check_space(out, info: StoreInfo, todo: Sequence[Shard], say):
    """Says what the missing shards will take; UserError where the disk has less."""
    needed = info.example_bytes * sum(len(shard.indices) for shard in todo)
    if shards.is_remote(out):
        say(f"{needed / 1e9:.2f} GB to write")
        return
    free = shutil.disk_usage(out).free
    say(f"{needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")
    if needed > free:
        raise UserError(
            f"{out}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free: take another "
            f"--out, fewer config.views, or a smaller config.codec"
        )


def _finish(config: Tokens, out, info: StoreInfo, source):
    """TFDS's metadata and the manifest, now that all shards are there; earlier views are kept."""
    before = 0
    if (out / "dataset_info.json").exists():
        before = len(records.open_builder(out).info.splits)
    known = shards.receipts(out)
    written = {
        token_store.view_split(view): [
            known[shard.path.name] for shard in _shards_of(config, out, info, view)
        ]
        for view in range(max(before, config.views))
    }
    shards.seal(out, known)
    features = token_store.features(info, source.label)
    records.write_metadata(out, features, written, info.name)
