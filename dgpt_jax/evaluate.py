"""Measures an encoder: `python -m dgpt_jax.evaluate --config=configs/… --checkpoint=PATH`.

PATH is a work directory, or weights that tools/convert.py reads. Prints a table and adds the
results, with 95 % intervals and all that the protocol asks, to one JSON file a model: --out, or
results_stepN.json in a work directory, or NAME.results.json beside weights. --untrained=SEED
measures the same encoder as training would start it, and only prints. tools/report.py puts such
files beside published numbers.
"""

import dgpt_jax.starting  # noqa: F401

import dataclasses
import shlex
from collections.abc import Iterator

import jax
import numpy as np

from dgpt_jax import cli, config, hosts, load, outputs, records, sharding
from dgpt_jax.config import Evaluate
from dgpt_jax.evals import features, fewshot, knn, probe, results, robustness
from dgpt_jax.schema import UserError

SOURCES = {
    "knn": "facebookresearch/dinov2 dinov2/eval/knn.py",
    "linear": "L-BFGS on standardised features; not a published protocol",
    "fewshot": "google-research/big_vision evaluators/fewshot_lsr.py",
}


def evaluate(settings: Evaluate, encoder: load.Encoder) -> Iterator[list[dict]]:
    """Rows of results (evals/results.py) of a protocol on frozen features, as they are measured."""
    mesh = sharding.make_mesh(config.Mesh())
    extract = features.Extractor(
        lambda params, pictures: dataclasses.replace(encoder, params=params).pooled(
            pictures, settings.features
        ),
        mesh,
        batch_size=settings.batch_size,
        most=settings.most,
        threads=settings.threads,
    )
    view = features.centre_view(encoder.model.image_size, settings.resize, settings.squash)
    train, test = (
        features.Records(records.Split(settings.data, split))
        for split in (settings.train, settings.test)
    )
    params = jax.device_put(encoder.params, sharding.replicated(mesh))
    train, test = extract(params, train, view), extract(params, test, view)
    del params
    how = {
        "source": SOURCES[settings.protocol],
        "path": results.location(settings.data),
        **preprocessing(settings, encoder),
    }
    rows, name = [], records.open_builder(settings.data).info.name
    for pooling in settings.features:
        for found in measure(settings, train.pop(pooling), test.pop(pooling)):
            rows.append(found | {"data": name, "features": pooling, "how": found["how"] | how})
            yield rows[-1:]
    yield results.mean_over_seeds(rows)


def preprocessing(settings: Evaluate, encoder: load.Encoder) -> dict:
    """How a picture becomes the encoder's input, for the record."""
    return {
        "crop": encoder.model.image_size,
        "filter": "bicubic, antialiased",
        "mean": list(encoder.preprocess.mean),
        "std": list(encoder.preprocess.std),
        **({"most": settings.most} if settings.most else {}),
    }


def measure(settings: Evaluate, train: features.Bank, test: features.Bank) -> Iterator[dict]:
    """Rows of a protocol, for every number of shots and seed. Raises UserError where `train` lacks
    classes that `test` has."""
    _refuse_missing_classes(settings, train.labels, test.labels)
    for shots in settings.shots:
        for seed in settings.seeds if shots else settings.seeds[:1]:
            chosen = probe.few_labels(train.labels, shots, seed)
            what = {
                "protocol": settings.protocol,
                "data": settings.data,
                "splits": f"{settings.train} → {settings.test}",
                "features": "",
                "shots": shots or "all",
                "seed": seed if shots else None,
                "resize": settings.resize,
                "squash": settings.squash,
                "train": len(chosen),
            }
            for found, correct, selection, how in _counts(settings, train, test, chosen):
                yield results.row(what | found, correct, len(test), selection=selection, how=how)


def _counts(settings: Evaluate, train: features.Bank, test: features.Bank, chosen: np.ndarray):
    """(what it is, number of correct ones, its selection, more about how) of a protocol's results
    on the `chosen` training examples."""
    if settings.protocol == "knn":
        how = {"temperature": settings.temperature}
        hits = knn.correct(
            train, test, ks=settings.k, temperature=settings.temperature, chosen=chosen
        )
        return [({"k": k}, correct, "none", how) for k, correct in hits.items()]
    train = train.select(chosen)
    if settings.protocol == "fewshot":
        correct = fewshot.correct(train, test, l2=settings.l2)
        return [({}, correct, "none", {"l2": settings.l2})]
    found = probe.linear_probe(train, test)
    selection = "l2 by cross-validation on the training labels"
    return [({}, found.correct, selection, {"l2": found.l2})]


def _refuse_missing_classes(settings: Evaluate, train: np.ndarray, test: np.ndarray):
    if len(missing := np.setdiff1d(test, train)):
        raise UserError(
            f"{settings.data}: split {settings.test} has {len(missing)} classes that "
            f"{settings.train} has not: it is not mixed (imported folders are sorted by class), so "
            f"take all of it (config.train)"
        )


def open_weights(settings: Evaluate, path: str, untrained: int | None) -> load.Encoder:
    """What a protocol measures. Raises UserError."""
    if settings.protocol == "robustness":
        if untrained is not None:
            raise UserError("--untrained has no head, and robustness needs one")
        return load.load_classifier(path)
    encoder = load.load_encoder(path)
    return encoder if untrained is None else load.untrained(encoder.model, untrained)


def main():
    made = cli.parser(__doc__, Evaluate)
    made.add_argument(
        "--checkpoint", type=cli.path, required=True, help="work directory or weights"
    )
    made.add_argument("--out", type=cli.path, help="JSON file that the results are added to")
    made.add_argument(
        "--untrained", type=int, least=0, metavar="SEED", help="measure its initialisation"
    )
    arguments, settings = cli.parse(made, Evaluate)
    hosts.start(settings.hosts, settings.platform)
    if arguments.out and not jax.process_index():  # which is the one that writes
        outputs.file(arguments.out)
    weights = open_weights(settings, arguments.checkpoint, arguments.untrained)
    say = (lambda line: None) if jax.process_index() else cli.say
    for note in weights.notes:
        say(note)
    out, parameters = arguments.out, ""
    if arguments.untrained is None or out:
        out = out or results.default_path(arguments.checkpoint, weights.run.get("step"))
        if not jax.process_index():
            outputs.file(out)
        parameters = results.digest(weights.params)
        results.refuse_another(out, weights.source, parameters)
    if settings.protocol == "robustness":
        measured = robustness.evaluate(settings, weights, preprocessing(settings, weights), say)
    else:
        measured = evaluate(settings, weights)
    rows = gather(measured, out, weights, parameters)
    if jax.process_index():
        return
    print(f"{weights.source} on {settings.data}")
    print(results.table(rows))
    print("low, high: 95 % interval of the accuracy over draws of the test examples (Wilson)")
    if out:
        print(f"added to {out}")
    print(f"next: python tools/report.py {shlex.quote(str(out)) if out else 'RESULTS.json…'}")


def gather(measured: Iterator[list[dict]], out, weights: load.Encoder, parameters: str) -> list:
    """All rows; process 0 adds them to the file `out`, if there is one, as they are measured."""
    rows, model = [], dataclasses.asdict(weights.model)
    try:
        for some in measured:
            if out and some and not jax.process_index():
                results.merge(out, weights.source, model, some, parameters)
            rows += some
    except BaseException:
        if out and rows and not jax.process_index():
            print(f"stopped: {len(rows)} rows that were measured before are in {out}")
        raise
    return rows


if __name__ == "__main__":
    cli.run(main)
