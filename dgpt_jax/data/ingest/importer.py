"""Collections of images as a TFDS image dataset; image_files.py says in which form they may come.

JPEG and PNG bytes are kept as they are, except that EXIF orientation is baked in (training ignores
it), CMYK becomes RGB and transparent images are composited on a background; anything else Pillow
reads becomes PNG. Of images deeper than 8 bits, unsigned integers are scaled by their container's
range; signed integers and floats need --range. Unreadable files are reported, counted and left out:
those that Pillow refuses, and those that training's decoder would.

An import that was stopped, by whatever, continues when the same command is given again: shards that
are complete are kept, and the result is the same to the byte.
"""

import contextlib
import functools
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from dgpt_jax import image_files, import_settings, records, shards, user_images, views
from dgpt_jax.members import Member, Members
from dgpt_jax.progress import Clock, duration
from dgpt_jax.schema import UserError

SHARD_SIZE = 16384
SAY_EVERY = 10  # seconds
TRANSPARENT = re.compile(r"(\d+) transparent images")  # a note beside those of unreadable files


@dataclass
class Report:
    """What became of the files."""

    examples: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    transparent: int = 0
    passed: list[str] = field(default_factory=list)


def import_images(
    src,
    out,
    *,
    split=None,
    labels=None,
    options: user_images.Options = user_images.DEFAULT,
    shard_size: int = SHARD_SIZE,
    threads: int = 8,
    check: bool = False,
    say=print,
) -> Report:
    """Writes the images of `src` as an image dataset `out`. Raises UserError.

    `shard_size` counts files; see image_files.find for `split` and `labels`. Where `out` holds part
    of the same import it continues, where it holds all it only reports. Shards that are there are
    known by their size; with `check` they are read, and their checksums must be right, too.
    """
    out = epath.Path(out)
    if "://" not in str(src) and os.path.realpath(src) == os.path.realpath(out):
        raise UserError(f"{out} is the source itself: choose another --out")
    if shard_size < 1 or threads < 1:
        raise UserError(f"shard_size {shard_size} and threads {threads} must be at least 1")
    try:
        out.exists()
    except ImportError as e:
        raise UserError(f"{out} cannot be opened: {e}") from e
    found = image_files.find(src, split=split, labels=labels, say=say)
    settings = import_settings.of(src, found, shard_size, options)
    import_settings.refuse_another(out, settings)
    parts = {name: _shards(out, name, part, shard_size) for name, part in found.splits.items()}
    receipts = shards.receipts(out)
    with ThreadPoolExecutor(threads) as pool:
        damaged = shards.damaged(out, receipts, pool, check=check)
        is_sealed = (out / "dataset_info.json").exists() and (out / shards.MANIFEST).exists()
        if is_sealed and not damaged:
            say(f"{out} is finished: nothing to do")
            return _report(found, parts, receipts)
        import_settings.refuse_earlier_rules(out, receipts)
        counts = ", ".join(f"{name} {len(members)}" for name, members in found.splits.items())
        say(f"{src}: {counts} images, {len(found.classes)} classes, {_gigabytes(found.bytes)}")
        receipts = _kept(out, receipts, damaged, say)
        _refuse_too_large(out, found, receipts)
        out.mkdir(parents=True, exist_ok=True)
        shards.sweep(out)
        import_settings.write(out, settings)
        receipts = _write_missing(found, parts, receipts, options, pool, 4 * threads, say)
    return _finish(src, out, found, parts, receipts)


def _finish(src, out: epath.Path, found: image_files.Found, parts, receipts) -> Report:
    """TFDS's metadata and the manifest, now that all shards are there. Raises UserError."""
    report = _report(found, parts, receipts)
    if 0 in report.examples.values():
        if not any(report.examples.values()):
            _discard(out, parts)
        name = next(name for name, examples in report.examples.items() if not examples)
        raise UserError(
            f"none of the {len(found.splits[name])} images of {src} ({name}) could be read; the "
            f"first: {report.broken[0]}"
        )
    written = {name: [receipts[path.name] for path in part] for name, part in parts.items()}
    records.write_metadata(out, records.image_features(found.classes), written)
    shards.seal(out, {path.name: receipts[path.name] for part in parts.values() for path in part})
    return report


def _discard(out: epath.Path, parts):
    """Removes what an import without a single image has written: no other could go on with it."""
    for path in (path for part in parts.values() for path in part):
        shards.remove(path)
    (out / import_settings.FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies there
        out.rmdir()


def _shards(out, split: str, members: Members, size: int) -> dict[epath.Path, Members]:
    count = -(-len(members) // size)
    return {
        records.shard_path(out, split, i, count): members.take(slice(i * size, (i + 1) * size))
        for i in range(count)
    }


def _kept(out, receipts, damaged: list[str], say) -> dict[str, shards.Receipt]:
    """Receipts of the shards that an earlier command completed; of damaged ones they are taken
    back."""
    if not receipts:
        return {}
    for name in damaged:
        shards.forget(out / name)
    again = f", {len(damaged)} damaged ones are written again" * bool(damaged)
    say(f"{out} was begun before: {len(receipts) - len(damaged)} shards are kept{again}")
    return {name: receipt for name, receipt in receipts.items() if name not in damaged}


def _refuse_too_large(out: epath.Path, found: image_files.Found, receipts):
    """Raises UserError where the disk has no room for what is still to be written."""
    if shards.is_remote(out):
        return
    place = Path(out).resolve()
    while not place.exists():
        place = place.parent
    needed = found.bytes - sum(receipt.bytes for receipt in receipts.values())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{out} needs about {_gigabytes(needed)} more and {place} has {_gigabytes(free)} free: "
            f"make room or choose another --out"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _report(found: image_files.Found, parts, receipts) -> Report:
    examples = {
        name: sum(receipts[path.name].records for path in part) for name, part in parts.items()
    }
    written = [receipts[path.name] for part in parts.values() for path in part]
    broken = [line for receipt in written for line in _broken(receipt)]
    notes = (TRANSPARENT.fullmatch(line) for receipt in written for line in receipt.notes)
    transparent = sum(int(note[1]) for note in notes if note)
    return Report(examples, found.classes, broken, transparent, found.passed.lines())


def _broken(receipt: shards.Receipt) -> list[str]:
    """Lines "id: reason" of the files that were left out of a shard."""
    return [line for line in receipt.notes if not TRANSPARENT.fullmatch(line)]


class _Progress:
    """Says every few seconds, and after every shard, how far the import has come."""

    def __init__(self, found: image_files.Found, parts, receipts, say):
        kept = [p for part in parts.values() for p in part.items() if p[0].name in receipts]
        self._total = sum(len(members) for members in found.splits.values())
        self._done = sum(len(members) for _, members in kept)
        self._broken = sum(len(_broken(receipts[path.name])) for path, _ in kept)
        self._say, self._clock = say, Clock(self._done, self._total, 1)
        self._said = time.monotonic()

    def advance(self, broken: bool):
        self._done += 1
        self._broken += broken
        if time.monotonic() > self._said + SAY_EVERY:
            self.show()

    def show(self):
        self._said, values = time.monotonic(), self._clock.read(self._done)
        self._say(
            f"{self._done}/{self._total} ({self._done / self._total:.1%}), "
            f"{values.get('images_per_second', 0):.0f} img/s, {self._broken} unreadable so far, "
            f"eta {duration(values.get('eta_seconds', 0))}"
        )


def _write_missing(
    found: image_files.Found, parts, receipts, options, pool, window: int, say
) -> dict[str, shards.Receipt]:
    """Writes the shards without a receipt; the receipts of all."""
    receipts, features = dict(receipts), records.image_features(found.classes)
    progress = _Progress(found, parts, receipts, say)
    function = functools.partial(_stored, options=options)
    for path, members in (shard for part in parts.values() for shard in part.items()):
        if path.name not in receipts:
            receipts[path.name] = _write(
                path, _ahead(pool, function, members, window), features, progress
            )
    return receipts


def _write(path, results: Iterable[tuple], features, progress) -> shards.Receipt:
    """Writes a shard of (member, user_images.Stored or why there is none)."""
    notes: list[str] = []
    serialize = records.serializer(features)

    def examples() -> Iterator[bytes]:
        transparent = 0
        for member, result in results:
            progress.advance(isinstance(result, str))
            if isinstance(result, str):
                notes.append(f"{member.id}: {result}")
                continue
            transparent += result.transparent
            example = {"id": member.id, "image": result.data}
            if "label" in features:
                example["label"] = member.label
            yield serialize(example)
        if transparent:
            notes.append(f"{transparent} transparent images")

    receipt = shards.write(path, examples(), notes)
    progress.show()
    return receipt


def _ahead(pool, function, items: Iterable, window: int) -> Iterator[tuple]:
    """(item, function(item)) in order, with no more than `window` results waiting in memory."""
    waiting = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) == window:
                item, result = waiting.popleft()
                yield item, result.result()
        while waiting:
            item, result = waiting.popleft()
            yield item, result.result()
    finally:
        for _, result in waiting:
            result.cancel()


def _stored(member: Member, options: user_images.Options) -> user_images.Stored | str:
    """What to store, or why there is nothing."""
    try:
        return user_images.stored(member.read(), options)
    except views.Unreadable as e:
        return str(e)
    except OSError as e:
        return f"{type(e).__name__}: {e}"
