"""Verifies token stores by running the teacher again on stored images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dgpt_jax.config import roots
from dgpt_jax.data import bad_records, further_teachers, image_ops, token_codec, token_store
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.tokens import views
from dgpt_jax.tokens.teacher import Teacher

# Loss of cosine beyond the codec's: matmuls sum in another order on other hardware.
SLACK = {"float32": 1e-4, "bfloat16": 3e-3}
MAX_PIXEL_DIFFERENCE = 2.0  # of 255, mean: libraries round differently


@dataclass(frozen=True)
class TokenReport:
    """One stored example: `least` and `median` cosine of its tokens to the live teacher's, and how
    it differs from its source ("" if it does not, or without a source)."""

    id: str
    view: image_ops.View
    least: float
    median: float
    differs: str = ""


@dataclass(frozen=True)
class ShardReport:
    """Sampled examples of one shard of a view."""

    split: str
    shard: int
    examples: tuple[TokenReport, ...]

    @property
    def worst(self) -> TokenReport:
        """The example that differs from its source, or that of the smallest median."""
        return min(self.examples, key=lambda example: (not example.differs, example.median))

    def is_sound(self, least: float, median: float) -> bool:
        """True if all examples reach the thresholds and match the source."""
        return all(
            example.least >= least and example.median >= median and not example.differs
            for example in self.examples
        )


def thresholds(teacher: TeacherInfo) -> tuple[float, float]:
    """Returns the minimum (least, median) cosine of a sound example, from the codec's measured loss
    and the teacher's dtype."""
    slack = SLACK[teacher.weights["dtype"]]
    least, mean = teacher.cosine
    return 1 - 4 * (1 - least) - slack, 1 - 2 * (1 - mean) - slack


def verify(
    store: Path | str,
    settings: roots.TeacherConfig,
    *,
    samples: int = 4,
    batch_size: int = 16,
    source: str = "",
    further: str | None = None,
) -> Iterator[ShardReport]:
    """Re-runs the teacher on `samples` examples of every shard; yields a report per shard.

    `source`: the image dataset; its views are drawn and rendered again, too. `further`: name of the
    further teacher whose tokens are verified, of the same examples; default: the first. Raises
    UserError if the weights or the source are not those of the store.
    """
    token_store.require_finished(store)
    info, directory = StoreInfo.load(store), store
    stated = info.teacher
    if further is not None:
        stated, directory = further_teachers.open_directory(store, further)
    codec = stated.load_codec(directory)
    teacher = Teacher(settings, batch_size)
    if teacher.hash != stated.weights["hash"]:
        raise UserError(
            f"{directory} was built with the teacher {stated.weights['hash']}, these weights are "
            f"{teacher.hash}"
        )
    original = _open_source(store, info, source) if source else None
    for view, (name, split) in enumerate(tfds_dataset.open_builder(store).info.splits.items()):
        examples = tfds_dataset.Split(store, name)
        tokens = examples if further is None else tfds_dataset.Split(directory, name)
        start = 0
        for shard, length in enumerate(split.shard_lengths):
            indices = start + np.unique(np.linspace(0, length - 1, samples).astype(int))
            start += length
            stored = [examples[i] for i in indices]
            images = np.stack(
                [
                    bad_records.decode_image(examples, i, example)
                    for i, example in zip(indices, stored, strict=True)
                ]
            )
            live = codec.project(teacher(images))
            targets = stored if further is None else [tokens[i] for i in indices]
            decoded = codec.decode(np.stack([target["tokens"] for target in targets]))
            reports = []
            for i, example, target, cosines in zip(
                indices, stored, targets, token_codec.cosines(decoded, live), strict=True
            ):
                top, left, height, width = map(int, example["box"])
                box = image_ops.View(top, left, height, width, bool(example["flip"]))
                differs = ""
                if target["id"] != example["id"]:
                    differs = f"id: the tokens are of {target['id']}"
                elif original:
                    differs = _difference(info, original, view, int(i), example, box)
                least, median = float(cosines.min()), float(np.median(cosines))
                reports.append(TokenReport(example["id"], box, least, median, differs))
            yield ShardReport(name, shard, tuple(reports))


def _open_source(store: Path | str, info: StoreInfo, source: str) -> tfds_dataset.Split:
    """Opens the source of a store. Raises UserError if its contents have changed."""
    if "derived" in info.source:
        raise UserError(
            f"{store} was copied from other stores ({info.command}) and has other indices than "
            f"{source}: verify it without --source, and those stores with it"
        )
    original = tfds_dataset.Split(source, info.source["split"])
    if len(original) != info.source["examples"]:
        raise UserError(
            f"{store} was built from {counted(info.source['examples'], 'example')}, {original} has "
            f"{len(original)}"
        )
    if info.source.get("digest", original.digest) != original.digest:
        raise UserError(
            f"{store} was built from other contents (digest {info.source['digest']}) than "
            f"{original} has now ({original.digest}): its source was imported again"
        )
    return original


def _difference(
    info: StoreInfo,
    source: tfds_dataset.Split,
    view: int,
    index: int,
    example: dict,
    box: image_ops.View,
) -> str:
    """Describes how a stored example differs from its view, drawn and rendered again."""
    record = source[index]
    if record["id"] != example["id"]:
        return f"id: the source has {record['id']}"
    image = bad_records.decode_image(source, index, record)
    drawn = views.draw(SimpleNamespace(**info.views), index, view, *image.shape[:2])
    if drawn != box:
        return f"box: redrawn as {drawn.box} flip {int(drawn.flip)}"
    crop = image_ops.render(image, drawn, info.image.height)
    rendered = image_ops.decode_image(image_ops.encode_image(crop, info.image.encoding))
    stored = image_ops.decode_image(example["image"])
    difference = np.abs(rendered.astype(int) - stored.astype(int)).mean()
    if difference > MAX_PIXEL_DIFFERENCE:
        return f"image: mean difference {difference:.1f} of 255 from the re-rendered view"
    return ""
