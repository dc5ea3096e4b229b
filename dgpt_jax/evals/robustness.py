"""Fine-tuned weights on ImageNet's test sets, each by its own rule (see test_sets.py)."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import config, load, sharding, views
from dgpt_jax.config import Evaluate
from dgpt_jax.evals import features, imagenet, results, test_sets
from dgpt_jax.evals.test_sets import IMAGENET_C, SETS, KnownSet
from dgpt_jax.schema import UserError

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
    settings: Evaluate, classifier: load.Classifier, preprocessing: dict, say: Callable = print
) -> Iterator[list[dict]]:
    """The rows of each test set that is below `settings.data`, when it is measured; `say` hears of
    those that are not there.

    Raises UserError where there is none, or where the weights have not ImageNet's 1000 classes; and
    before any is measured where one cannot be used.
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
    sets = {known: test_sets.find(root, known) for known in SETS}
    for known, source in sets.items():
        if source is None:
            say(f"absent: {known.name}; {known.how}")
    sets = {known: source for known, source in sets.items() if source is not None}
    corruptions = _corruptions(root, say)
    if not sets and not corruptions:
        raise UserError(f"{root} holds none of the test sets; the lines above say how to get them")
    predict = Predictor(settings, classifier)
    how = {"path": str(root), **preprocessing}
    for known in list(sets):
        yield measure(settings, known, sets.pop(known), predict, how)
    yield from _corrupted(corruptions, predict, how)


class Predictor:
    """(pictures, view, masks) → predicted classes (N, masks), labels (N, W)."""

    def __init__(self, settings: Evaluate, classifier: load.Classifier):
        mesh = sharding.make_mesh(config.Mesh())
        self.size = classifier.model.image_size
        self.view = features.centre_view(self.size, settings.resize, settings.squash)

        def encode(given, pictures):
            params, masks = given
            logits = dataclasses.replace(classifier, params=params).logits(pictures)
            masked = jnp.where(masks[None], logits[:, None], -jnp.inf)
            found = masked.argmax(axis=-1).astype(jnp.int32)
            return {"class": jnp.where(jnp.isfinite(logits).all(axis=-1)[:, None], found, -1)}

        self._banks = features.Extractor(
            encode,
            mesh,
            batch_size=settings.batch_size,
            most=settings.most,
            threads=settings.threads,
        )
        self._params = jax.device_put(classifier.params, sharding.replicated(mesh))
        self._place = partial(jax.device_put, device=sharding.replicated(mesh))

    def __call__(self, source, view: Callable, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """masks: bool (M, 1000): among which classes the M answers are looked for.

        Raises UserError where there are none, and where logits are not finite.
        """
        if not masks.any(axis=1).all():
            raise UserError(f"{source}: none of the model's classes is among its answers")
        bank = self._banks((self._params, self._place(masks)), source, view)["class"]
        predicted = bank.gathered()
        bad = int((predicted < 0).any(axis=1).sum())
        features.refuse_not_finite(bad, len(predicted), f"{source}: logits")
        return predicted, bank.labels


def correct(predicted: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """(how many are right, of how many that count): predicted (N,), labels (N, W) padded with -1.

    An example is right if its prediction is among its labels; one without labels does not count.
    """
    counted = (labels >= 0).any(axis=1)
    return int((predicted[:, None] == labels)[counted].any(axis=1).sum()), int(counted.sum())


def _incomplete(of: int, known: KnownSet) -> dict:
    return {} if known.examples in (None, of) else {"incomplete": f"{of} of {known.examples}"}


def _mask(classes) -> np.ndarray:
    mask = np.zeros(imagenet.CLASSES, bool)
    mask[list(classes)] = True
    return mask


def measure(settings: Evaluate, known: KnownSet, source, predict: Predictor, how: dict) -> list:
    """The rows of one test set: one, and for ObjectNet one more of the mapped classes."""
    answers = {known.name: _mask(known.classes or range(imagenet.CLASSES))}
    if known.name == "objectnet":
        answers["objectnet_113"] = _mask(np.unique(source.labels[source.labels >= 0]))
    # Two answers always, so that one compiled program serves all sets.
    masks = np.stack([*answers.values()] * (3 - len(answers)))
    predicted, labels = predict(source, predict.view, masks)
    rows = []
    for i, name in enumerate(answers):
        right, of = correct(predicted[:, i], labels)
        what = {
            "protocol": "robustness", "data": name, "resize": settings.resize,
            "squash": settings.squash,
        }  # fmt: skip
        what |= _incomplete(of, known)
        found = how | {"source": SOURCES[name]}
        rows.append(results.row(what, right, of, selection="none", how=found))
    return rows


def central(image: np.ndarray, size: int) -> np.ndarray:
    """The central 224 pixels of a picture that is stored as the model is to see it; for a model of
    another size they are resized."""
    cut = min(224, *image.shape[:2])
    top, left = (round((n - cut) / 2) for n in image.shape[:2])
    return views.resize(image[top : top + cut, left : left + cut], size, size)


def _corruptions(root: Path, say: Callable) -> dict[str, object]:
    """{CORRUPTION/SEVERITY: source} of ImageNet-C's 75 that are below a directory."""
    every = {
        f"{corruption}/{severity}": test_sets.find_corrupted(root, corruption, severity)
        for corruption in imagenet.ALEXNET
        for severity in imagenet.SEVERITIES
    }
    there = {name: source for name, source in every.items() if source is not None}
    if absent := [name for name in every if name not in there]:
        some = f" ({len(there)} of 75 are there, so there is no mean)" if there else ""
        say(f"absent: imagenet_c{some}, first {absent[0]}; {IMAGENET_C.how}")
    return there


def _corrupted(there: dict[str, object], predict: Predictor, how: dict) -> Iterator[list[dict]]:
    """ImageNet-C: a row for each corruption and severity, and their mean where all are there.
    Takes each source out of `there` when it is measured."""
    rows = []
    for name in list(there):
        masks = np.ones((2, imagenet.CLASSES), bool)
        predicted, labels = predict(there.pop(name), partial(central, size=predict.size), masks)
        right, of = correct(predicted[:, 0], labels)
        what = {"protocol": "robustness", "data": f"imagenet_c/{name}"}
        what |= _incomplete(of, IMAGENET_C)
        found = how | {"source": SOURCES["imagenet_c"]}
        rows.append(results.row(what, right, of, selection="none", how=found) | {"detail": True})
        yield rows[-1:]
    if len(rows) < len(imagenet.ALEXNET) * len(imagenet.SEVERITIES):
        return
    accuracy = {row["data"].removeprefix("imagenet_c/"): row["accuracy"] / 100 for row in rows}
    plain, normalised = corruption_errors(accuracy)
    summary = {
        "protocol": "robustness", "data": "imagenet_c", "test": sum(row["test"] for row in rows),
        "accuracy": 100 - plain, "mean error": plain, "mCE": normalised, "selection": "none",
        "how": rows[0]["how"], "date": rows[0]["date"],
    }  # fmt: skip
    # No interval: the same images are counted 75 times.
    yield [summary]


def corruption_errors(accuracy: dict[str, float]) -> tuple[float, float]:
    """(plain mean error, mCE normalised by AlexNet's), in percent, of {corruption/severity}.

    mCE: mean over the corruptions of Σ error / Σ AlexNet's error over the severities.
    """
    plain, normalised = [], []
    for corruption, alexnet in imagenet.ALEXNET.items():
        errors = [1 - accuracy[f"{corruption}/{severity}"] for severity in imagenet.SEVERITIES]
        plain.append(np.mean(errors))
        normalised.append(np.mean(errors) / alexnet)
    return 100 * float(np.mean(plain)), 100 * float(np.mean(normalised))
