"""Examples from TFDS directories; each is a function of (seed, stream position).

Position i of the endless stream is an example of an epoch (samplers.py); its random choices (view,
segment order, augmentation) are drawn from (seed, i). loader.py makes batches of them.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.config import ClassificationConfig, DataConfig, ModelConfig
from dgpt_jax.data import bad_records, class_names, token_store
from dgpt_jax.data.further_teachers import feature_name, join_splits
from dgpt_jax.data.transforms import ClassificationTransform, PretrainTransform
from dgpt_jax.errors import BadRecord, UserError, counted
from dgpt_jax.storage import file_limits, gcs, tfds_dataset


@dataclass(frozen=True)
class ExampleDataset:
    """Examples by stream position: transform(record, data, seed, position) of a record.

    Picklable, for worker processes.
    """

    sources: "file_limits.RecentSplits[tfds_dataset.Split]"
    transform: Callable[[dict, DataConfig, int, int], dict[str, np.ndarray]]
    data: DataConfig
    seed: int
    policy: bad_records.Policy

    def __len__(self) -> int:
        return len(self.sources.splits[0])

    def identity(self) -> dict:
        """Returns JSON that identifies the data: number of examples, a digest per view or split,
        the hash of the teacher of stored tokens, or the class names."""
        splits = self.sources.splits
        identity = {"examples": len(self), "views": [split.digest for split in splits]}
        if token_store.exists(self.data.path):
            teacher = token_store.StoreInfo.load(self.data.path).teacher
            identity["teacher"] = teacher.weights.get("hash", "")
        elif splits[0].label is not None:
            identity["classes"] = list(splits[0].label.names)
        return identity

    def counters(self) -> dict[str, float]:
        """Returns this process's counts so far: replaced bad records; for remote data, bytes
        fetched and seconds that reader threads waited for them, summed over threads."""
        counters: dict[str, float] = {"bad_records": self.policy.bad}
        cache = self.sources.splits[0].cache
        if cache is None:
            return counters
        fetched = {"fetched_bytes": cache.fetched_bytes, "fetch_wait_seconds": cache.waited_seconds}
        return counters | fetched

    def check(self, batch: dict[str, np.ndarray]):
        """Raises UserError if a batch has labels outside the config's classes."""
        if "label" in batch:
            check_labels(
                batch["label"], self.sources.splits[0], self.transform.classify.num_classes
            )

    def __call__(
        self, position: int, index: int, epoch: int | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the example `index` for a stream position; epoch e reads view e mod K. Default:
        the epoch of a global shuffle."""
        return self.read(position, index, position // len(self) if epoch is None else epoch)[0]

    def read(self, position: int, index: int, epoch: int) -> tuple[dict[str, np.ndarray], bool]:
        """Returns the example, and True if it replaces a bad one."""
        source = self.sources.activate(epoch % len(self.sources.splits))
        return self.policy.load_or_replace(partial(self._example, source, position), index)

    def _example(
        self, source: tfds_dataset.Split, position: int, index: int
    ) -> dict[str, np.ndarray]:
        record = source[index]
        with bad_records.decode_errors(source, index, record):
            return self.transform(record, self.data, self.seed, position)


def open_examples(
    data: DataConfig,
    model: ModelConfig,
    seed: int,
    *,
    first: bool = True,
    teachers: Sequence[str] = (),
) -> ExampleDataset:
    """Returns the dataset of a pretraining config. Raises UserError if they do not match.

    first: False without the tokens of a store's first teacher. teachers: names of the further ones
    whose tokens are read too.
    """
    opened = _open_splits(data)
    stored = token_store.exists(data.path)
    if data.targets == "stored" and not stored:
        raise UserError(
            f"config.data.targets=stored needs a token store, not {data.path}: build one "
            f"with `{invocation.command('tokens')}`, or set config.data.targets=online"
        )
    if data.targets == "online" and stored:
        raise UserError(
            f"config.data.targets=online needs an image dataset, and {data.path} is a token store"
        )
    tokens = ["tokens"] * (stored and first) + [feature_name(name) for name in teachers]
    transform = PretrainTransform(stored, model, tuple(tokens))
    return _make_dataset(opened, data, seed, transform, teachers)


def open_labelled(
    data: DataConfig, model: ModelConfig, classify: ClassificationConfig, seed: int
) -> ExampleDataset:
    """Returns the dataset of a supervised config. Raises UserError if they do not match."""
    if token_store.exists(data.path):  # it would crop images that are crops already
        raise UserError(
            f"config.task=classify needs an image dataset, and {data.path} is a token store: set "
            f"config.data.path to the dataset that it was built from"
        )
    transform = ClassificationTransform(model.image_size, classify)
    examples = _make_dataset(_open_splits(data), data, seed, transform)
    require_labels(examples.sources.splits[0], classify)
    return examples


def require_labels(split: tfds_dataset.Split, classify: ClassificationConfig):
    """Raises UserError unless the split is labelled with as many classes as the config has."""
    if split.label is None:
        raise UserError(f"{split} has no labels")
    if split.label.num_classes != classify.num_classes:
        raise UserError(
            f"{split} has labels of {counted(split.label.num_classes, 'class', 'classes')}, the "
            f"config expects "
            f"{classify.num_classes} (config.classify.num_classes)"
        )
    check_first_label(split)


def require_same_classes(split: tfds_dataset.Split, trained: tfds_dataset.Split):
    """Raises UserError if the class names of two splits differ, or their order. Datasets without
    class names (their names are the numbers) match any."""
    assert split.label is not None and trained.label is not None
    names, expected = split.label.names, trained.label.names
    if (i := class_names.first_difference(names, expected)) is not None:
        raise UserError(
            f"class {i} is {names[i]!r} in {split}, but {expected[i]!r} in {trained}, the training "
            f"data: predictions would be scored as other classes. Import both with the same classes"
        )


def check_first_label(split: tfds_dataset.Split):
    """Raises UserError if the first example has no label, before anything is computed: usually all
    examples have one, or none. Remote data are only checked batch by batch, as all data are.
    """
    if split.cache is None and split.label is not None:
        with contextlib.suppress(BadRecord):  # the policy for bad records applies later
            check_labels(np.array([split[0]["label"]]), split, split.label.num_classes)
        split.close()


def check_labels(labels: np.ndarray, split: object, classes: int):
    """Raises UserError unless all labels (N,) of examples of the split are in [0, classes). Label
    -1 means none, and would index the last class."""
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        raise UserError(
            f"{split}: {bad.sum()} of {len(bad)} examples read have no label in [0, {classes}) "
            f"(the first has {labels[bad.argmax()]}; -1: no label): choose a labelled split, or "
            f"import it with `{invocation.command('import')} --labels=FILE`"
        )


def _open_splits(data: DataConfig) -> tfds_dataset.Opened:
    gcs.require(data.path)
    if not epath.Path(data.path).exists():
        raise UserError(f"no such directory: {data.path} (config.data.path)")
    token_store.require_finished(data.path)
    opened = tfds_dataset.Opened(data.path, data.cache)
    if opened.cache is not None and data.workers:
        raise UserError(
            f"config.data.workers must be 0 for remote data ({data.path}), which the training "
            f"process fetches: set config.data.threads instead"
        )
    return opened


def _make_dataset(
    opened: tfds_dataset.Opened,
    data: DataConfig,
    seed: int,
    transform: Callable,
    teachers: Sequence[str] = (),
) -> ExampleDataset:
    stored = token_store.exists(data.path)
    names = [data.split]
    if stored:
        token_store.check_features(data.path, opened.builder.info.features)
        views = len(opened.builder.info.splits)
        if data.views is not None and not 1 <= data.views <= views:
            raise UserError(
                f"config.data.views={data.views}: {data.path} has {counted(views, 'view')}"
            )
        names = [token_store.view_split(v) for v in range(data.views or views)]
    splits = [tfds_dataset.Split(data.path, name, opened) for name in names]
    if data.examples not in (None, len(splits[0])):
        raise UserError(
            f"{splits[0]} has {counted(len(splits[0]), 'example')}, the config expects "
            f"{data.examples} (config.data.examples): --config.data.examples=None takes any number"
        )
    if teachers:
        splits = join_splits(data.path, splits, teachers)
    default = "error" if stored else "skip"
    policy = bad_records.Policy(
        skip=(data.bad_records or default) == "skip",
        max_fraction=data.max_bad_fraction,
        length=len(splits[0]),
    )
    return ExampleDataset(file_limits.RecentSplits(splits), transform, data, seed, policy)
