"""Evaluates an encoder: `python -m dgpt_jax.evaluate --config=NAME --checkpoint=PATH`.

PATH is a work directory, or weights that tools/convert.py reads. Prints a table and adds the
results, with 95 % intervals and the protocol's parameters, to one JSON file per model: --out, or
results_stepN.json in a work directory, or NAME.results.json beside weights. --untrained=SEED
evaluates the same architecture at initialization and prints only. tools/results.py tabulates such
files beside published numbers.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import dataclasses
import shlex
from collections.abc import Iterator
from typing import cast

import jax
import numpy as np
from etils import epath

from dgpt_jax import cli, invocation
from dgpt_jax.config import EvaluateConfig, roots
from dgpt_jax.distributed import multihost, sharding
from dgpt_jax.errors import UserError, counted
from dgpt_jax.evals import feature_bank, features, fewshot, knn, probe, results, robustness
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.storage import output_paths, tfds_dataset
from dgpt_jax.weights import api, flags

SOURCES = {
    "knn": "facebookresearch/dinov2 dinov2/eval/knn.py",
    "linear": "L-BFGS on standardised features; not a published protocol",
    "fewshot": "google-research/big_vision evaluators/fewshot_lsr.py",
}


def evaluate(settings: EvaluateConfig, encoder: api.PretrainedEncoder) -> Iterator[list[dict]]:
    """Yields rows of results (evals/results.py) of a protocol on frozen features."""
    mesh = sharding.make_mesh(roots.MeshConfig())
    extract = features.Extractor(
        lambda params, images: dataclasses.replace(encoder, params=params).pooled(
            images, settings.features
        ),
        mesh,
        batch_size=settings.batch_size,
        max_examples=settings.max_examples,
        threads=settings.threads,
    )
    view = features.center_view(encoder.model.image_size, settings.resize, settings.squash)
    train_source, test_source = (
        features.RecordSource(tfds_dataset.Split(settings.data, split))
        for split in (settings.train, settings.test)
    )
    params = jax.device_put(encoder.params, sharding.replicated(mesh))
    train, test = extract(params, train_source, view), extract(params, test_source, view)
    del params
    how = {
        "source": SOURCES[settings.protocol],
        "path": results.location(settings.data),
        **preprocessing(settings, encoder),
    }
    rows, name = [], tfds_dataset.open_builder(settings.data).info.name
    for pooling in settings.features:
        for row in measure(settings, train.pop(pooling), test.pop(pooling)):
            rows.append(row | {"data": name, "features": pooling, "how": row["how"] | how})
            yield rows[-1:]
    yield results.mean_over_seeds(rows)


def preprocessing(settings: EvaluateConfig, encoder: api.PretrainedEncoder) -> dict:
    """Preprocessing of images, recorded under `how` of a row."""
    return {
        "crop": encoder.model.image_size,
        "filter": "bicubic, antialiased",
        "mean": list(encoder.preprocess.mean),
        "std": list(encoder.preprocess.std),
        **({"most": settings.max_examples} if settings.max_examples else {}),
    }


def measure(
    settings: EvaluateConfig, train: feature_bank.FeatureBank, test: feature_bank.FeatureBank
) -> Iterator[dict]:
    """Yields rows of a protocol, for every number of shots and seed. Raises UserError if `train`
    lacks classes that `test` has."""
    _refuse_missing_classes(settings, train.labels, test.labels)
    for shots in settings.shots:
        for seed in settings.seeds if shots else settings.seeds[:1]:
            chosen = probe.few_labels(train.labels, shots, seed)
            identity = {
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
            for extra, correct, selection, how in _counts(settings, train, test, chosen):
                fields = identity | extra
                yield results.row(fields, correct, len(test), selection=selection, how=how)


def _counts(
    settings: EvaluateConfig,
    train: feature_bank.FeatureBank,
    test: feature_bank.FeatureBank,
    chosen: np.ndarray,
):
    """(identifying fields, correct examples, selection, parameters) of each of a protocol's results
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
    result = probe.linear_probe(train, test)
    selection = "l2 by cross-validation on the training labels"
    return [({}, result.correct, selection, {"l2": result.l2})]


def _refuse_missing_classes(settings: EvaluateConfig, train: np.ndarray, test: np.ndarray):
    if len(missing := np.setdiff1d(test, train)):
        raise UserError(
            f"{settings.data}: split {settings.test} has "
            f"{counted(len(missing), 'class', 'classes')} that {settings.train} lacks: imports are "
            f"sorted by class, so a slice misses some; set config.train to the full split"
        )


def open_weights(
    settings: EvaluateConfig, path: str, untrained: int | None, heads: int | None = None
) -> api.PretrainedEncoder:
    """The encoder, or for robustness the classifier, to evaluate. Raises UserError."""
    if settings.protocol == "robustness":
        if untrained is not None:
            raise UserError("--untrained has no classification head, which robustness needs")
        return api.load_classifier(path, heads=heads)
    encoder = api.load_encoder(path, heads=heads)
    return encoder if untrained is None else api.untrained(encoder.model, untrained)


def main():
    parser = cli.parser(__doc__, EvaluateConfig)
    parser.add_argument(
        "--checkpoint", type=cli.path, required=True, help="work directory or weights"
    )
    flags.add_encoder(parser)
    parser.add_argument("--out", type=cli.path, help="JSON file to add the results to")
    parser.add_argument(
        "--untrained", type=int, least=0, metavar="SEED", help="evaluate it at initialization"
    )
    arguments, settings = cli.parse(parser, EvaluateConfig)
    multihost.start(settings.hosts, settings.platform)
    kernel_check.select(settings.kernels, cli.say)
    if arguments.out and not jax.process_index():  # the process that writes
        output_paths.file(arguments.out)
    weights = open_weights(settings, arguments.checkpoint, arguments.untrained, arguments.heads)
    say = (lambda line: None) if jax.process_index() else cli.say
    for note in weights.notes:
        say(note)
    out, parameters = arguments.out, ""
    if arguments.untrained is None or out:
        out = out or results.default_path(arguments.checkpoint, weights.run.get("step"))
        if arguments.smoke and not arguments.out:  # never among real results
            out = out.with_name(f"smoke_{out.name}")
        if not jax.process_index():
            output_paths.file(out)
        parameters = results.digest(weights.params)
        results.refuse_another(out, weights.source, parameters)
    if settings.protocol == "robustness":
        head = cast(api.PretrainedClassifier, weights)
        batches = robustness.evaluate(settings, head, preprocessing(settings, head), say)
    else:
        batches = evaluate(settings, weights)
    rows = gather(batches, out, weights, parameters)
    if jax.process_index():
        return
    print(f"{weights.source} on {settings.data}")
    print(results.table(rows))
    print("low, high: 95 % Wilson interval of the accuracy, for the sampling of test examples")
    if out:
        print(f"added to {out}")
    if out:
        print(f"next: {invocation.command('results')} {shlex.quote(str(out))}")
    else:
        print("next: run the same command without --untrained, to compare")


def gather(
    batches: Iterator[list[dict]],
    out: epath.PathLike | None,
    weights: api.PretrainedEncoder,
    parameters: str,
) -> list[dict]:
    """All rows of the batches; process 0 adds each batch to the file `out`, if any, at once."""
    rows, model = [], dataclasses.asdict(weights.model)
    try:
        for batch in batches:
            if out and batch and not jax.process_index():
                results.merge(out, weights.source, model, batch, parameters)
            rows += batch
    except BaseException:
        if out and rows and not jax.process_index():
            print(f"stopped: {out} has what was evaluated so far, {counted(len(rows), 'row')}")
        raise
    return rows


if __name__ == "__main__":
    cli.run(main)
