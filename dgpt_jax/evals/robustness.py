"""Fine-tuned weights on ImageNet's test sets, each scored by its own rule (see test_sets.py)."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax.config import EvaluateConfig, roots
from dgpt_jax.data import image_ops
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_bank, features, imagenet, results, test_sets
from dgpt_jax.evals.test_sets import IMAGENET_C, SETS, TestSet, TestSource
from dgpt_jax.weights import api

SOURCES = {
    "imagenet": "argmax of the 1000 classes",
    "imagenet_v2": "argmax of the 1000 classes; folders are class numbers",
    "imagenet_sketch": "argmax of the 1000 classes",
    "imagenet_real": "google-research/reassessed-imagenet README: right if among the labels; "
    "images without any do not count",
    "imagenet_a": "hendrycks/natural-adv-examples eval.py: argmax of its 200 classes",
    "imagenet_r": "hendrycks/imagenet-r eval.py: argmax of its 200 classes",
    "imagenet_hard": "taesiri/ZoomIsAllYouNeed src/ImageNet_Hard: right if among the labels",
    "objectnet": "abarbu/objectnet-template-pytorch: argmax of the 1000 classes, right if mapped "
    "to the object; a border of 2 pixels is cut off",
    "objectnet_113": "the same, argmax of the classes that are mapped to objects",
    "imagenet_c": "hendrycks/robustness ImageNet-C/test.py: central 224 pixels, no resizing",
}


def evaluate(
    settings: EvaluateConfig,
    classifier: api.PretrainedClassifier,
    preprocessing: dict,
    say: Callable[[str], None] = print,
) -> Iterator[list[dict]]:
    """Yields the rows of each test set below `settings.data` as it is evaluated; `say` receives a
    line for each missing one.

    Raises UserError if there is none, if the weights lack ImageNet's 1000 classes, or, before the
    first evaluation, if some set is unusable.
    """
    if classifier.num_classes != imagenet.CLASSES:
        raise UserError(
            f"{classifier.source} has {classifier.num_classes} classes, ImageNet's test sets need "
            f"{imagenet.CLASSES}"
        )
    imagenet.check_order(classifier.classes, classifier.source, say)
    root = Path(settings.data)
    if not root.is_dir():
        raise UserError(f"no such directory: {root}")
    sets = {test_set: test_sets.find(root, test_set) for test_set in SETS}
    for test_set, source in sets.items():
        if source is None:
            say(f"absent: {test_set.name}; {test_set.source}")
    sets = {test_set: source for test_set, source in sets.items() if source is not None}
    corruptions = _corruptions(root, say)
    if not sets and not corruptions:
        raise UserError(f"{root} holds no test sets; the lines above say how to obtain them")
    predict = Predictor(settings, classifier)
    how = {"path": str(root), **preprocessing}
    for test_set in list(sets):
        yield measure(settings, test_set, sets.pop(test_set), predict, how)
    yield from _corrupted(corruptions, predict, how)


class Predictor:
    """Predicts the classes of a source's images; see __call__."""

    def __init__(self, settings: EvaluateConfig, classifier: api.PretrainedClassifier):
        mesh = sharding.make_mesh(roots.MeshConfig())
        self.size = classifier.model.image_size
        self.view = features.center_view(self.size, settings.resize, settings.squash)

        def encode(inputs, images):
            params, masks = inputs
            logits = dataclasses.replace(classifier, params=params).logits(images)
            masked = jnp.where(masks[None], logits[:, None], -jnp.inf)
            classes = masked.argmax(axis=-1).astype(jnp.int32)
            return {"class": jnp.where(jnp.isfinite(logits).all(axis=-1)[:, None], classes, -1)}

        self._extractor = features.Extractor(
            encode,
            mesh,
            batch_size=settings.batch_size,
            max_examples=settings.max_examples,
            threads=settings.threads,
        )
        self._params = jax.device_put(classifier.params, sharding.replicated(mesh))
        self._replicate = partial(jax.device_put, device=sharding.replicated(mesh))

    def __call__(
        self, source: TestSource, view: Callable, masks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (N, M) and labels (N, W). masks: bool (M, 1000), the allowed classes of each
        of M predictions per image; view: turns an image into the model's input.

        Raises UserError if a mask allows no class, and on non-finite logits.
        """
        if not masks.any(axis=1).all():
            raise UserError(f"{source}: none of the model's classes is among its answers")
        bank = self._extractor((self._params, self._replicate(masks)), source, view)["class"]
        predicted = bank.gathered()
        bad = int((predicted < 0).any(axis=1).sum())
        feature_bank.refuse_not_finite(bad, len(predicted), f"{source}: logits")
        return predicted, bank.labels


def correct(predicted: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """(correct examples, examples that count): predicted (N,), labels (N, W) padded with -1.

    An example is correct if its prediction is among its labels; without labels it does not count.
    """
    counted = (labels >= 0).any(axis=1)
    return int((predicted[:, None] == labels)[counted].any(axis=1).sum()), int(counted.sum())


def _incomplete(total: int, test_set: TestSet) -> dict:
    expected = test_set.examples
    return {} if expected in (None, total) else {"incomplete": f"{total} of {expected}"}


def _mask(classes: Iterable[int]) -> np.ndarray:
    mask = np.zeros(imagenet.CLASSES, bool)
    mask[list(classes)] = True
    return mask


def measure(
    settings: EvaluateConfig,
    test_set: TestSet,
    source: TestSource,
    predict: Predictor,
    how: dict,
) -> list[dict]:
    """Rows of one test set: one, and for ObjectNet a second among the mapped classes."""
    answers = {test_set.name: _mask(test_set.classes or range(imagenet.CLASSES))}
    if test_set.name == "objectnet":
        labels = source.labels  # pyright: ignore[reportAttributeAccessIssue] # of FileImages
        answers["objectnet_113"] = _mask(np.unique(labels[labels >= 0]))
    # Always two masks, so that one compiled program serves all sets.
    masks = np.stack([*answers.values()] * (3 - len(answers)))
    predicted, labels = predict(source, predict.view, masks)
    rows = []
    for i, name in enumerate(answers):
        hits, total = correct(predicted[:, i], labels)
        identity = {
            "protocol": "robustness", "data": name, "resize": settings.resize,
            "squash": settings.squash,
        }  # fmt: skip
        identity |= _incomplete(total, test_set)
        full_how = how | {"source": SOURCES[name]}
        rows.append(results.row(identity, hits, total, selection="none", how=full_how))
    return rows


def central(image: np.ndarray, size: int) -> np.ndarray:
    """Central 224 pixels of an ImageNet-C image, resized for a model of another size."""
    cut = min(224, *image.shape[:2])
    top, left = (round((n - cut) / 2) for n in image.shape[:2])
    return image_ops.resize(image[top : top + cut, left : left + cut], size, size)


def _corruptions(root: Path, say: Callable[[str], None]) -> dict[str, TestSource]:
    """{CORRUPTION/SEVERITY: source} of those of ImageNet-C's 75 sets that exist below `root`."""
    every = {
        f"{corruption}/{severity}": test_sets.find_corrupted(root, corruption, severity)
        for corruption in imagenet.ALEXNET
        for severity in imagenet.SEVERITIES
    }
    present = {name: source for name, source in every.items() if source is not None}
    if absent := [name for name in every if name not in present]:
        partly = f" ({len(present)} of 75 exist, so there is no mean)" if present else ""
        say(f"absent: imagenet_c{partly}, first {absent[0]}; {IMAGENET_C.source}")
    return present


def _corrupted(
    sources: dict[str, TestSource], predict: Predictor, how: dict
) -> Iterator[list[dict]]:
    """Rows of ImageNet-C: one for each corruption and severity, and their mean if all exist.
    Removes each source from `sources` when it is evaluated, to free its memory."""
    rows = []
    for name in list(sources):
        masks = np.ones((2, imagenet.CLASSES), bool)
        predicted, labels = predict(sources.pop(name), partial(central, size=predict.size), masks)
        hits, total = correct(predicted[:, 0], labels)
        identity = {"protocol": "robustness", "data": f"imagenet_c/{name}"}
        identity |= _incomplete(total, IMAGENET_C)
        full_how = how | {"source": SOURCES["imagenet_c"]}
        row = results.row(identity, hits, total, selection="none", how=full_how)
        rows.append(row | {"detail": True})
        yield rows[-1:]
    if len(rows) < len(imagenet.ALEXNET) * len(imagenet.SEVERITIES):
        return
    accuracy = {row["data"].removeprefix("imagenet_c/"): row["accuracy"] / 100 for row in rows}
    plain, normalized = corruption_errors(accuracy)
    summary = {
        "protocol": "robustness", "data": "imagenet_c", "test": sum(row["test"] for row in rows),
        "accuracy": 100 - plain, "mean error": plain, "mCE": normalized, "selection": "none",
        "how": rows[0]["how"], "date": rows[0]["date"],
    }  # fmt: skip
    # No interval: the same images are counted 75 times.
    yield [summary]


def corruption_errors(accuracy: dict[str, float]) -> tuple[float, float]:
    """(mean error, mCE normalized by AlexNet's) in percent, of {corruption/severity: accuracy}.

    mCE: mean over the corruptions of Σ error / Σ AlexNet's error over the severities.
    """
    plain, normalized = [], []
    for corruption, alexnet in imagenet.ALEXNET.items():
        errors = [1 - accuracy[f"{corruption}/{severity}"] for severity in imagenet.SEVERITIES]
        plain.append(np.mean(errors))
        normalized.append(np.mean(errors) / alexnet)
    return 100 * float(np.mean(plain)), 100 * float(np.mean(normalized))
