"""Embeds images: writes the features of an encoder for every image of a source.

Shards of the source are computed in order; each that is complete is a line of `.progress.jsonl`. A
command that was killed at any moment continues after the last complete shard, and the result is
the same, byte for byte: which images share a batch depends only on their positions.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from dgpt_jax import invocation
from dgpt_jax._version import __version__
from dgpt_jax.data.ingest.types import Columns, Images
from dgpt_jax.errors import UserError, counted
from dgpt_jax.evals import results
from dgpt_jax.evals.embedding import feature_batches, feature_files, image_sources, journal
from dgpt_jax.evals.embedding.feature_batches import Batch, Encoder
from dgpt_jax.evals.embedding.feature_outputs import Output, Shard, damaged, disk_errors
from dgpt_jax.evals.embedding.feature_store import FeatureInfo
from dgpt_jax.evals.embedding.image_sources import Source
from dgpt_jax.evals.embedding.journal import Done, EmbeddingProgress
from dgpt_jax.storage import array_record_shards, disk_space, tfds_dataset
from dgpt_jax.weights.api import PretrainedEncoder

BATCH_SIZE, SHARD_SIZE, THREADS = 64, 4096, 8
MAX_BAD_FRACTION = 0.001  # of an image dataset, as in training (config.data.max_bad_fraction)
# Metadata that a command must share with those that it continues, and the flags that set them.
FIXED = {
    "to": "--to", "tokens": "--tokens", "dtype": "--dtype", "batch_size": "--batch_size",
    "shard_size": "--shard_size", "encoder": "--checkpoint", "preprocessing": "preprocessing",
    "source": "source, --split or --labels", "classes": "classes", "texts": "--keep",
}  # fmt: skip


def embed(
    src: Path | str,
    encoder: PretrainedEncoder,
    out: Path | str,
    *,
    to: str = "npy",
    tokens: str = "cls",
    dtype: str = "float32",
    split: str | None = None,
    labels: Path | str | None = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    batch_size: int = BATCH_SIZE,
    shard_size: int = SHARD_SIZE,
    threads: int = THREADS,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    say: Callable[[str], None] = print,
) -> FeatureInfo:
    """Writes the features of the images of `src` into a local directory; returns their metadata.

    to, tokens, dtype: one of feature_store.FORMATS, TOKENS and DTYPES. split, labels, columns: of
    image_sources.open_source. batch_size: images per device at a time. shard_size: images that an
    interruption loses at most. Unreadable images are left out: of user images as many as there are,
    of a dataset at most `max_bad_fraction`, of a token store none. Raises UserError.
    """
    out = Path(out)
    feature_files.check_format(to, tokens, dtype)
    source = image_sources.open_source(src, split=split, labels=labels, columns=columns, say=say)
    view, preprocessing, notes = feature_batches.preprocessing(encoder, source.kind)
    model = Encoder(encoder, tokens, dtype, batch_size)
    info = FeatureInfo(
        name=tfds_dataset.dataset_name(out), to=to, tokens=tokens, dtype=dtype, shape=model.shape,
        encoder=_describe(encoder), preprocessing=preprocessing, source=source.describe(),
        classes=source.classes, texts=source.texts, batch_size=batch_size, shard_size=shard_size,
        command=invocation.command_line(), code_version=__version__,
    )  # fmt: skip
    model.check()
    info = _resume_or_create(out, info)
    if info.is_finished:
        _check_finished(out, info)
        say(f"{out} is finished: nothing to do")
        return info
    for line in (*source.notes, *notes):
        say(line)
    plan = list(_plan(source, shard_size))
    output = feature_files.open_output(out, info)
    done = _restore(out, output, plan, say)
    todo = {shard: _images(source, shard, shard_size) for shard in plan if shard not in done}
    _check_disk_space(out, info, sum(map(len, todo.values())))
    batches = feature_batches.extract(source, list(todo.values()), model, view, threads)
    total = sum(map(len, source.splits.values()))
    progress = EmbeddingProgress(total, done.values(), say)
    with contextlib.closing(batches), contextlib.closing(progress):
        for shard, images in todo.items():
            count = feature_batches.num_batches(images, model)
            done[shard] = _write(output, shard, itertools.islice(batches, count), progress)
            journal.check_unreadable(source, done.values(), max_bad_fraction)
            journal.append(out, done[shard])
    return _finish(out, info, source, output, [done[shard] for shard in plan])


def _describe(encoder: PretrainedEncoder) -> dict[str, Any]:
    return {
        "source": encoder.source,
        "hash": results.digest(encoder.params),
        "step": encoder.run.get("step"),
        "model": dataclasses.asdict(encoder.model),
    }


def _plan(source: Source, size: int) -> Iterator[Shard]:
    for split, images in source.splits.items():
        count = math.ceil(len(images) / size)
        yield from (Shard(split, number, count) for number in range(count))


def _images(source: Source, shard: Shard, size: int) -> Images:
    return source.splits[shard.split].take(slice(shard.number * size, (shard.number + 1) * size))


def _check_disk_space(out: Path, info: FeatureInfo, images: int) -> None:
    """Raises UserError if the disk lacks space for the features of so many images."""
    remedy = "free some, choose another --out, or --dtype=float16"
    disk_space.require(out, images * info.row_bytes, remedy)


def _resume_or_create(out: Path, info: FeatureInfo) -> FeatureInfo:
    """Returns the metadata in `out`, written if it is new. Raises UserError if it has features that
    this command would not compute, or anything else."""
    saved = FeatureInfo.load(out)
    if saved is None:
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"{out} already contains other files: choose another --out")
        _check_disk_space(out, info, sum(info.source["images"].values()))
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        info.save(out)
        return info
    old, new = saved.to_json(), info.to_json()
    for content in (old, new):  # the same weights and images may have moved
        content["encoder"] = {k: content["encoder"].get(k) for k in ("hash", "model")}
        content["source"].pop("path", None)
    for name, flag in FIXED.items():
        if old[name] != new[name]:
            raise UserError(
                f"{out} was started with other {flag}{_difference(old[name], new[name])}: repeat "
                f"the first command ({saved.command}), or choose another --out"
            )
    return saved


def _difference(old: Any, new: Any) -> str:
    """Returns " OLD, not NEW" of two values, of dicts the first key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
        return f" ({name}{_difference(old.get(name), new.get(name))})"
    short = [value if len(str(value)) < 40 else f"{str(value)[:40]}…" for value in (old, new)]
    return f" {short[0]}, not {short[1]}"


def _check_finished(out: Path, info: FeatureInfo) -> None:
    """Raises UserError if a file is missing or of another size than was written."""
    for name in sorted(damaged(out, info.files)):
        raise UserError(
            f"{out / name} is missing or was changed ({info.files[name]} bytes were written): "
            f"delete {out} and run the command again"
        )


def _restore(
    out: Path, output: Output, plan: Sequence[Shard], say: Callable[[str], None]
) -> dict[Shard, Done]:
    """Returns the complete shards of earlier commands, and removes what is incomplete. Raises
    UserError."""
    array_record_shards.remove_partial_files(out)
    shards = {(shard.split, shard.number): shard for shard in plan}
    entries = journal.read(out)
    sizes = {name: size for entry in entries for name, size in entry.files.items()}
    rewritten = output.restore(sizes)
    done = {
        shards[entry.split, entry.number]: entry
        for entry in entries
        if not rewritten & entry.files.keys()
    }
    if entries:
        again = f", {counted(len(rewritten), 'damaged one')} again" * bool(rewritten)
        say(f"resuming {out}: keeping {counted(len(done), 'shard')} of {len(plan)}{again}")
    journal.write(out, done.values())
    return done


def _write(
    output: Output, shard: Shard, batches: Iterator[Batch], progress: EmbeddingProgress
) -> Done:
    rows, unreadable = 0, []

    def counted_batches() -> Iterator[Batch]:
        nonlocal rows
        for batch in batches:
            yield batch
            rows += len(batch.rows)
            unreadable.extend(batch.unreadable)
            progress.advance(len(batch.rows), len(batch.unreadable))

    files = output.write(shard, counted_batches())
    return Done(shard.split, shard.number, rows, files, unreadable)


def _finish(
    out: Path, info: FeatureInfo, source: Source, output: Output, done: list[Done]
) -> FeatureInfo:
    """Completes the files and the metadata. Raises UserError if a split has no readable image."""
    rows = Counter({split: 0 for split in source.splits})
    unreadable: dict[str, list[str]] = {split: [] for split in source.splits}
    for entry in done:
        rows[entry.split] += entry.rows
        unreadable[entry.split] += entry.unreadable
    for split, count in rows.items():
        if not count:
            if not any(rows.values()):  # no other command could continue it
                _remove(out, done)
            raise UserError(
                f"none of {counted(len(source.splits[split]), 'image')} of {source.path} ({split}) "
                f"could be read; the first: {unreadable[split][0]}"
            )
    files = output.finish(rows)
    splits = {name: {"rows": rows[name], "unreadable": unreadable[name]} for name in rows}
    info = dataclasses.replace(info, splits=splits, files=dict(sorted(files.items())))
    info.save(out)
    journal.remove(out)
    return info


def _remove(out: Path, done: Iterable[Done]) -> None:
    """Removes the files of an embedding without a readable image."""
    for name in {name for entry in done for name in entry.files}:
        array_record_shards.remove(epath.Path(out / name))
    journal.remove(out)
    FeatureInfo.remove(out)
    with contextlib.suppress(OSError):  # the directory has other files
        out.rmdir()
