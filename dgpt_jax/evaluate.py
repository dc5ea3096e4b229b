"""Measures an encoder: `python -m dgpt_jax.evaluate --config=configs/… --checkpoint=PATH`.

PATH is a work directory, or safetensors that tools/convert.py wrote. Prints a table and, with
--out, writes the results as JSON.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from dgpt_jax import cli, config, hosts, load, records, schema, sharding
from dgpt_jax.config import Evaluate
from dgpt_jax.evals import features, knn, probe


def evaluate(settings: Evaluate, encoder: load.Encoder) -> list[dict]:
    """One result a row: protocol, features, shots, seed, test examples, accuracy in percent."""
    mesh = sharding.make_mesh(config.Mesh())
    pooling = settings.features
    extract = features.Extractor(
        lambda params, pictures: dataclasses.replace(encoder, params=params).features(
            pictures, pooling
        ),
        mesh,
        size=encoder.model.image_size,
        resize=settings.resize,
        squash=settings.squash,
        batch_size=settings.batch_size,
    )
    params = jax.device_put(encoder.params, sharding.replicated(mesh))
    train = extract(params, records.Split(settings.data, settings.train))
    test = extract(params, records.Split(settings.data, settings.test))
    return [result | {"features": pooling} for result in measure(settings, train, test)]


def measure(settings: Evaluate, train, test) -> list[dict]:
    """Results of a protocol on (features, labels) pairs, for every number of shots and seed."""
    train_x, train_y = train
    test_x, test_y = test
    results = []
    for shots in settings.shots:
        for seed in settings.seeds if shots else settings.seeds[:1]:
            chosen = probe.few_labels(train_y, shots, seed)
            data = (train_x[chosen], train_y[chosen], test_x, test_y)
            if settings.protocol == "knn":
                by_k = knn.knn_accuracy(*data, ks=settings.k, temperature=settings.temperature)
                found = [{"k": k, "accuracy": 100 * accuracy} for k, accuracy in by_k.items()]
            else:
                result = probe.linear_probe(*data)
                found = [{"l2": result.l2, "accuracy": 100 * result.accuracy}]
            row = {
                "protocol": settings.protocol,
                "shots": shots or "all",
                "seed": seed if shots else None,
                "train": len(chosen),
                "test": len(test_y),
            }
            results += [row | one for one in found]
    return results


def table(results: list[dict]) -> str:
    """Results as a Markdown table."""
    columns = list(results[0])

    def cell(value) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)

    rows = [columns, ["---"] * len(columns)]
    rows += [[cell(result[c]) for c in columns] for result in results]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    made = cli.parser(__doc__, Evaluate)
    made.add_argument("--checkpoint", required=True, help="work directory or .safetensors")
    made.add_argument("--out", help="write the results to this JSON file too")
    arguments, settings = cli.parse(made, Evaluate)
    hosts.start(settings.hosts, settings.platform)
    encoder = load.load_encoder(arguments.checkpoint)
    results = evaluate(settings, encoder)
    print(f"{encoder.source} on {settings.data}")
    print(table(results))
    if arguments.out:
        report = {
            "checkpoint": encoder.source,
            "config": schema.to_dict(settings),
            "results": results,
        }
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"next: python tools/convert.py {arguments.checkpoint} DIR --to=timm"
        if not arguments.checkpoint.endswith(".safetensors")
        else f"next: load it in timm with the config.json beside {arguments.checkpoint}"
    )


if __name__ == "__main__":
    cli.run(main)
