"""Results of models (evals/results.py) beside published numbers, as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dgpt_jax.config import model as model_config
from dgpt_jax.evals import published, results
from dgpt_jax.monitoring import markdown

NOT_RUN = "not run"
VALIDATION = 50_000  # images: identifies results on the ImageNet-1K validation set
# Column of the robustness table → dataset name in results.
SETS = {
    "IN": "imagenet", "V2": "imagenet_v2", "ReaL": "imagenet_real", "A": "imagenet_a",
    "R": "imagenet_r", "C": "imagenet_c", "Sketch": "imagenet_sketch", "Hard": "imagenet_hard",
}  # fmt: skip


def report(files: Iterable[Path | str]) -> str:
    """Three tables of published numbers and the models of these result files, then all rows of each
    model. Raises UserError on a file that is not a results file.

    Only results on complete test sets join the published ones. Cells of ours are bold and have
    their 95 % interval.
    """
    models = _models(files)
    finetuned = ("pretraining", *published.SIZES)
    robustness, frozen = published.ROBUSTNESS_COLUMNS, published.FROZEN_COLUMNS
    parts = [
        "## Fine-tuned on ImageNet-1K, 224 pixels, top-1",
        _table("finetuned", "method", finetuned, [x for m in models for x in _finetuned(m)]),
        "## Robustness of fine-tuned weights, top-1; C: plain mean error, lower is better",
        _table("robustness", "weights", robustness, [x for m in models for x in _robustness(m)]),
        "## Frozen features, ImageNet-1K, top-1; kNN: k = 20",
        _table("frozen", "encoder", frozen, [x for m in models for x in _frozen(m)]),
    ]
    for model in models:
        parts += [f"## All results of {_name(model)}", results.table(model["results"])]
    return "\n\n".join(parts)


def _models(files: Iterable[Path | str]) -> list[dict]:
    """Contents of the files; those of the same weights are merged."""
    models: dict[str, dict] = {}
    for content in map(results.read, files):
        model = models.setdefault(content["weights"], content | {"results": []})
        model["results"] = model["results"] + content["results"]
    return list(models.values())


def _name(model: dict) -> str:
    return f"{model['weights']} ({size_of(model['model'])})"


def size_of(model: dict) -> str:
    """Name of a model config's size ("B/16"), or its width and depth."""
    shape = tuple(model[name] for name in ("width", "depth", "heads", "patch"))
    names = {sizes: name for name, sizes in model_config.SIZES.items()}
    return names.get(shape, f"{model['width']} wide, {model['depth']} deep")


def _cell(row: dict | None, key: str = "accuracy") -> str | None:
    if row is None:
        return None
    interval = f" [{row['low']:.1f}, {row['high']:.1f}]" if "low" in row else ""
    return f"**{row[key]:.1f}**{interval}"


def _finetuned(model: dict) -> list[Sequence]:
    """A line for each resizing and each selection of the epoch: the best one on the test images is
    an optimistic choice."""
    lines = []
    for row in model["results"]:
        finetuned = row["protocol"] == "finetune" or row["data"] == "imagenet"  # of robustness
        if finetuned and row["test"] == VALIDATION:
            size = size_of(model["model"])[0]
            cells = [_cell(row) if size == column else None for column in published.SIZES]
            lines.append((_name(model), "ours", *cells, _selection(row)))
    return lines


def _robustness(model: dict) -> list[Sequence]:
    """A line for each resizing."""
    rows = [r for r in model["results"] if r["protocol"] == "robustness" and "detail" not in r]
    # ImageNet-C is not resized and belongs to every line.
    resizings = {r["squash"] for r in rows if "squash" in r} or {False for _ in rows}
    lines = []
    for squash in sorted(resizings):
        by_set = {
            r["data"]: r
            for r in rows
            if r.get("squash", squash) == squash and not r.get("incomplete")
        }
        keys = {"imagenet_c": "mean error"}
        cells = [_cell(by_set.get(s), keys.get(s, "accuracy")) for s in SETS.values()]
        if any(cells):
            lines.append((_name(model), *cells, "ours, squashed" if squash else "ours"))
    return lines


def _selection(row: dict) -> str:
    epoch = f"{row['epoch']} epoch, " if row.get("epoch") in ("last", "best") else ""
    return f"{epoch}selection: {row['selection']}" + ", squashed" * row.get("squash", False)


def _frozen(model: dict) -> list[Sequence]:
    """A line for each kind of features and each selection of a probe."""
    lines: dict[tuple[str, str], dict] = {}
    for row in model["results"]:
        columns = [c for c in published.FROZEN_COLUMNS if row["protocol"].startswith(c.lower())]
        complete = row["test"] == VALIDATION and not row.get("detail")
        if columns and complete and row.get("shots", "all") == "all" and row.get("k", 20) == 20:
            selected = row["protocol"] != "knn"  # kNN has nothing to select
            source = f"ours, {row['protocol']}, {_selection(row)}" if selected else "ours"
            name = f"{_name(model)}, {row['features']}"
            lines.setdefault((name, source), {})[columns[0]] = row
    return [
        (name, *(_cell(rows.get(c)) for c in published.FROZEN_COLUMNS), source)
        for (name, source), rows in lines.items()
    ]


def _table(name: str, title: str, columns: Sequence[str], ours: Sequence[Sequence]) -> str:
    """A published table followed by lines of ours, whose empty cells become NOT_RUN; without any, a
    single line of NOT_RUN."""
    lines = published.rows(name, ("name", *columns, "source"))
    ours = ours or [("**ours**", *[None] * (len(columns) + 1))]
    lines += [[NOT_RUN if cell is None else cell for cell in line] for line in ours]
    return markdown.table((title, *columns, "source"), lines, rule=" --- ")
