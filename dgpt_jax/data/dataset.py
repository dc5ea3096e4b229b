"""From a TFDS directory to examples: each is a function of (seed, position of the stream).

Position i of the endless stream is an example of an epoch (see orders.py); whatever is random about
it (view, segment order, augmentation) is drawn from (seed, i). What batches are made of them:
batching.py.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dgpt_jax import bad_records, class_names, gcs, open_files, records, token_store
from dgpt_jax.config import Classify, Data, Model
from dgpt_jax.examples import Labelled, Segmented
from dgpt_jax.schema import UserError


@dataclass(frozen=True)
class Examples:
    """Examples by position of the stream: `make(record, data, seed, position)` of a record.

    Picklable, for worker processes.
    """

    sources: open_files.TwoOpen
    make: Callable[[dict, Data, int, int], dict[str, np.ndarray]]
    data: Data
    seed: int
    policy: bad_records.Policy

    def __len__(self) -> int:
        return len(self.sources.splits[0])

    def identity(self) -> dict:
        """What is read, as JSON: the number of examples, a digest of each view, or of the split;
        the teacher that stored tokens are of; names of classes."""
        splits = self.sources.splits
        found = {"examples": len(self), "views": [split.digest for split in splits]}
        if token_store.exists(self.data.path):
            teacher = token_store.StoreInfo.load(self.data.path).teacher
            found["teacher"] = teacher.get("hash", "")
        elif splits[0].label is not None:
            found["classes"] = list(splits[0].label.names)
        return found

    def counters(self) -> dict[str, float]:
        """What this process has met so far: bad records that were passed over; where data are far,
        bytes that came, and seconds that reading threads stood still for them, all together."""
        found = {"bad_records": self.policy.bad}
        cache = self.sources.splits[0].cache
        if cache is None:
            return found
        fetched = {"fetched_bytes": cache.fetched_bytes, "fetch_wait_seconds": cache.waited_seconds}
        return found | fetched

    def check(self, batch: dict[str, np.ndarray]):
        """Raises UserError on a batch with labels that are not those of the config's classes."""
        if "label" in batch:
            check_labels(batch["label"], self.sources.splits[0], self.make.classify.num_classes)

    def __call__(
        self, position: int, index: int, epoch: int | None = None
    ) -> dict[str, np.ndarray]:
        """The example `index` at `position`; epoch e (default: as data near by count them) uses
        view e mod K."""
        return self.read(position, index, position // len(self) if epoch is None else epoch)[0]

    def read(self, position: int, index: int, epoch: int) -> tuple[dict[str, np.ndarray], bool]:
        """The same, and whether it stands in for one that is bad."""
        source = self.sources.begin(epoch % len(self.sources.splits))
        return self.policy.first_good(partial(self._example, source, position), index)

    def _example(self, source: records.Split, position: int, index: int) -> dict[str, np.ndarray]:
        record = source[index]
        with bad_records.named(source, index, record):
            return self.make(record, self.data, self.seed, position)


def open_examples(data: Data, model: Model, seed: int) -> Examples:
    """The examples that a pretraining config asks for. Raises UserError where they do not fit."""
    opened = _opened(data)
    stored = token_store.exists(data.path)
    if data.targets == "stored" and not stored:
        raise UserError(
            f"config.data.targets=stored needs a token store, and {data.path} is none: build one "
            f"with tools/build_tokens.py, or set config.data.targets=online"
        )
    if data.targets == "online" and stored:
        raise UserError(
            f"config.data.targets=online needs an image dataset, and {data.path} is a token store"
        )
    return _examples(opened, data, seed, Segmented(stored, model))


def open_labelled(data: Data, model: Model, classify: Classify, seed: int) -> Examples:
    """The examples that a supervised config asks for. Raises UserError where they do not fit."""
    if token_store.exists(data.path):  # of whose crops it would take crops
        raise UserError(
            f"config.task=classify needs an image dataset, and {data.path} is a token store: give "
            f"the dataset that it was built from"
        )
    make = Labelled(model.image_size, classify)
    examples = _examples(_opened(data), data, seed, make)
    require_labels(examples.sources.splits[0], classify)
    return examples


def require_labels(split: records.Split, classify: Classify):
    """Raises UserError unless the split has labels of as many classes as the config."""
    if split.label is None:
        raise UserError(f"{split} has no labels")
    if split.label.num_classes != classify.num_classes:
        raise UserError(
            f"{split} has labels of {split.label.num_classes} classes, the config expects "
            f"{classify.num_classes} (config.classify.num_classes)"
        )
    check_first_label(split)


def require_same_classes(split: records.Split, trained: records.Split):
    """Raises UserError where the classes of two splits, as many, have other names or another order.
    Datasets that name no classes have their numbers for names, and fit any."""
    names, expected = (x.label.names for x in (split, trained))
    if (i := class_names.first_difference(names, expected)) is not None:
        raise UserError(
            f"class {i} is {names[i]!r} in {split} and {expected[i]!r} in {trained}, which is "
            f"trained on: answers would be counted for other classes. Import both with the same "
            f"classes"
        )


def check_first_label(split: records.Split):
    """Raises UserError where the first example has no label: before anything is computed, where
    usually all or none have one. Batches are checked as they are read, and data on gs:// only so.
    """
    if split.cache is None:
        with contextlib.suppress(bad_records.BadRecord):  # its own policy says what becomes of it
            check_labels(np.array([split[0]["label"]]), split, split.label.num_classes)
        split.close()


def check_labels(labels: np.ndarray, split, classes: int):
    """Raises UserError unless all labels (N,), of examples of the split, are within `classes`; the
    label -1 means none, and would count as the last class."""
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        raise UserError(
            f"{split}: {bad.sum()} of {len(bad)} examples read together have no label of its "
            f"{classes} classes (the first has {labels[bad.argmax()]}; -1: no label): name a "
            f"labelled split, or import it with tools/import_images.py --labels"
        )


def _opened(data: Data) -> records.Opened:
    gcs.require(data.path)
    token_store.refuse_unfinished(data.path)
    opened = records.Opened(data.path, data.cache)
    if opened.cache is not None and data.workers:
        raise UserError(
            f"config.data.workers must be 0 for {data.path}: the training process fetches its "
            f"shards; config.data.threads read them"
        )
    return opened


def _examples(opened: records.Opened, data: Data, seed: int, make: Callable) -> Examples:
    stored = token_store.exists(data.path)
    names = [data.split]
    if stored:
        token_store.refuse_others(data.path, opened.builder.info.features)
        have = len(opened.builder.info.splits)
        if data.views is not None and not 1 <= data.views <= have:
            raise UserError(f"config.data.views {data.views}: {data.path} holds {have} views")
        names = [token_store.view_split(v) for v in range(data.views or have)]
    splits = [records.Split(data.path, name, opened) for name in names]
    if data.examples not in (None, len(splits[0])):
        raise UserError(
            f"{splits[0]} has {len(splits[0])} examples, the config expects {data.examples} "
            f"(config.data.examples)"
        )
    default = "error" if stored else "skip"
    policy = bad_records.Policy(
        skip=(data.bad_records or default) == "skip", most=data.bad_most, length=len(splits[0])
    )
    return Examples(open_files.TwoOpen(splits), make, data, seed, policy)
