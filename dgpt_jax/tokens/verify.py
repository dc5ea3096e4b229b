"""Whether a token store holds what it says: the teacher is run again on stored pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from dgpt_jax import bad_records, config, records, token_codec, token_store, token_writer, views
from dgpt_jax.schema import UserError
from dgpt_jax.teacher import Teacher
from dgpt_jax.token_store import StoreInfo

# What a sound store's cosines lose beyond its codec: matmuls that add in another order elsewhere.
SLACK = {"float32": 1e-4, "bfloat16": 3e-3}
PIXELS = 2.0  # mean difference of 255 to the view rendered again: libraries round differently


@dataclass(frozen=True)
class Found:
    """One stored example: `least` and `median` of its tokens' cosines to the live teacher's, and
    what of it is not as its source has it ("" where all is, or no source was given)."""

    id: str
    view: views.View
    least: float
    median: float
    differs: str = ""


@dataclass(frozen=True)
class Row:
    """What was found in one shard of a view."""

    split: str
    shard: int
    found: tuple[Found, ...]

    @property
    def worst(self) -> Found:
        return min(self.found, key=lambda found: (not found.differs, found.median))

    def is_sound(self, least: float, median: float) -> bool:
        return all(
            found.least >= least and found.median >= median and not found.differs
            for found in self.found
        )


def thresholds(info: StoreInfo) -> tuple[float, float]:
    """(least, median) cosine of the tokens of a sound example, from what the codec was measured to
    lose when the store was begun, and the teacher's dtype."""
    slack = SLACK[info.teacher["dtype"]]
    least, mean = info.cosine
    return 1 - 4 * (1 - least) - slack, 1 - 2 * (1 - mean) - slack


def verify(
    store, settings: config.Teacher, *, samples: int = 4, batch_size: int = 16, source: str = ""
) -> Iterator[Row]:
    """Re-runs the teacher on `samples` examples of every shard; a Row a shard, as they come.

    `source`: the image dataset; its views are drawn and rendered again, too. Raises UserError where
    the weights or the source are others than the store's.
    """
    token_store.refuse_unfinished(store)
    info = StoreInfo.load(store)
    codec = info.load_codec(store)
    teacher = Teacher(settings, batch_size)
    if teacher.hash != info.teacher["hash"]:
        raise UserError(
            f"{store} was built with the teacher {info.teacher['hash']}, these weights are "
            f"{teacher.hash}"
        )
    original = None
    if source:
        original = records.Split(source, info.source["split"])
        if len(original) != info.source["examples"]:
            raise UserError(
                f"{store} was built from {info.source['examples']} examples, {original} has "
                f"{len(original)}"
            )
        if info.source.get("digest", original.digest) != original.digest:
            raise UserError(
                f"{store} was built from other contents (digest {info.source['digest']}) than "
                f"{original} has now ({original.digest}): its source was imported anew"
            )
    for view, (name, split) in enumerate(records.open_builder(store).info.splits.items()):
        examples = records.Split(store, name)
        start = 0
        for shard, length in enumerate(split.shard_lengths):
            chosen = start + np.unique(np.linspace(0, length - 1, samples).astype(int))
            start += length
            stored = [examples[i] for i in chosen]
            pictures = np.stack(
                [
                    bad_records.picture(examples, i, example)
                    for i, example in zip(chosen, stored, strict=True)
                ]
            )
            live = codec.project(teacher(pictures))
            decoded = codec.decode(np.stack([example["tokens"] for example in stored]))
            found = []
            for i, example, cosines in zip(
                chosen, stored, token_codec.cosines(decoded, live), strict=True
            ):
                box = views.View(*(int(n) for n in example["box"]), bool(example["flip"]))
                differs = ""
                if original:
                    differs = _difference(info, original, view, int(i), example, box)
                least, median = float(cosines.min()), float(np.median(cosines))
                found.append(Found(example["id"], box, least, median, differs))
            yield Row(name, shard, tuple(found))


def _difference(info: StoreInfo, source, view: int, index: int, example, box: views.View) -> str:
    """In what a stored example differs from its view, drawn and rendered again."""
    record = source[index]
    if record["id"] != example["id"]:
        return f"id: the source has {record['id']}"
    image = bad_records.picture(source, index, record)
    drawn = token_writer.draw(SimpleNamespace(**info.views), index, view, *image.shape[:2])
    if drawn != box:
        return f"box: drawn again it is {drawn.box} flip {int(drawn.flip)}"
    rendered = views.encode_picture(views.render(image, drawn, info.picture_size), info.picture)
    pictures = (views.decode_picture(data) for data in (rendered, example["image"]))
    off = np.abs(np.subtract(*(picture.astype(int) for picture in pictures))).mean()
    return f"picture: {off:.1f} of 255 off the view rendered again" if off > PIXELS else ""
