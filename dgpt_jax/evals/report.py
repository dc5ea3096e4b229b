"""Results of models (evals/results.py) beside published numbers, as Markdown."""

from collections.abc import Iterable, Sequence

from dgpt_jax import published, sections
from dgpt_jax.evals import results

NOT_RUN = "not run"
VALIDATION = 50_000  # images: what marks a result as one of ImageNet-1K
# Column of the robustness table: the set's name in results.
SETS = {
    "IN": "imagenet", "V2": "imagenet_v2", "ReaL": "imagenet_real", "A": "imagenet_a",
    "R": "imagenet_r", "C": "imagenet_c", "Sketch": "imagenet_sketch", "Hard": "imagenet_hard",
}  # fmt: skip


def report(files: Iterable) -> str:
    """Three tables of published numbers with the models of result files in them, then all that each
    file holds. Raises UserError on a file of something else.

    Only results on whole sets stand beside published ones. A cell of ours has its 95 % interval.
    """
    models = _models(files)
    parts = [
        "## Fine-tuned on ImageNet-1K, 224 pixels, top-1",
        _markdown(
            ("method", "pretraining", *published.SIZES, "source"),
            [(name, of, *values, where) for name, of, values, where in published.FINETUNED],
            [row for model in models for row in _finetuned(model)],
        ),
        "## Robustness of fine-tuned weights, top-1; C: plain mean error, lower is better",
        _markdown(
            ("weights", *published.ROBUSTNESS_COLUMNS, "source"),
            [(name, *values, where) for name, values, where in published.ROBUSTNESS],
            [row for model in models for row in _robustness(model)],
        ),
        "## Frozen features, ImageNet-1K, top-1; kNN: k = 20",
        _markdown(
            ("encoder", *published.FROZEN_COLUMNS, "source"),
            [(name, *values, where) for name, values, where in published.FROZEN],
            [row for model in models for row in _frozen(model)],
        ),
    ]
    for model in models:
        parts += [f"## All results of {_name(model)}", results.table(model["results"])]
    return "\n\n".join(parts)


def _models(files: Iterable) -> list[dict]:
    """What the files hold, those of the same weights together."""
    found: dict[str, dict] = {}
    for model in map(results.read, files):
        before = found.setdefault(model["weights"], model | {"results": []})
        before["results"] = before["results"] + model["results"]
    return list(found.values())


def _name(model: dict) -> str:
    return f"{model['weights']} ({size_of(model['model'])})"


def size_of(model: dict) -> str:
    """ "B/16" of a model's config, or its width and depth."""
    shape = tuple(model[name] for name in ("width", "depth", "heads", "patch"))
    known = {sizes: name for name, sizes in sections.SIZES.items()}
    return known.get(shape, f"{model['width']} wide, {model['depth']} deep")


def _cell(row: dict | None, key: str = "accuracy") -> str | None:
    if row is None:
        return None
    interval = f" [{row['low']:.1f}, {row['high']:.1f}]" if "low" in row else ""
    return f"**{row[key]:.1f}**{interval}"


def _finetuned(model: dict) -> list[Sequence]:
    """A line for each way of resizing and each way in which the epoch was selected: the best one on
    the test images is an optimistic choice."""
    lines = []
    for row in model["results"]:
        tuned = row["protocol"] == "finetune" or row["data"] == "imagenet"  # of robustness
        if tuned and row["test"] == VALIDATION:
            size = size_of(model["model"])[0]
            cells = [_cell(row) if size == one else None for one in published.SIZES]
            lines.append((_name(model), "ours", *cells, _how(row)))
    return lines


def _robustness(model: dict) -> list[Sequence]:
    """A line for each way of resizing."""
    rows = [r for r in model["results"] if r["protocol"] == "robustness" and "detail" not in r]
    # ImageNet-C is not resized: it belongs to every line.
    ways = {r["squash"] for r in rows if "squash" in r} or {False for _ in rows}
    lines = []
    for squash in sorted(ways):
        found = {r["data"]: r for r in rows if r.get("squash", squash) == squash}
        found = {name: r for name, r in found.items() if not r.get("incomplete")}
        keys = {"imagenet_c": "mean error"}
        cells = [_cell(found.get(s), keys.get(s, "accuracy")) for s in SETS.values()]
        if any(cells):
            lines.append((_name(model), *cells, "ours, squashed" if squash else "ours"))
    return lines


def _how(row: dict) -> str:
    epoch = f"{row['epoch']} epoch, " if row.get("epoch") in ("last", "best") else ""
    return f"{epoch}selection: {row['selection']}" + ", squashed" * row.get("squash", False)


def _frozen(model: dict) -> list[Sequence]:
    """A line for each kind of features, and for each way in which a probe was selected."""
    lines: dict[tuple[str, str], dict] = {}
    for row in model["results"]:
        columns = [c for c in published.FROZEN_COLUMNS if row["protocol"].startswith(c.lower())]
        whole = row["test"] == VALIDATION and not row.get("detail")
        if columns and whole and row.get("shots", "all") == "all" and row.get("k", 20) == 20:
            own = row["protocol"] != "knn"  # the one that leaves nothing to be chosen
            how = f"ours, {row['protocol']}, {_how(row)}" if own else "ours"
            name = f"{_name(model)}, {row['features']}"
            lines.setdefault((name, how), {})[columns[0]] = row
    return [
        (name, *(_cell(found.get(c)) for c in published.FROZEN_COLUMNS), how)
        for (name, how), found in lines.items()
    ]


def _markdown(columns: Sequence[str], theirs: Sequence[Sequence], ours: Sequence[Sequence]) -> str:
    """A table; with no line of ours, one that says so. Cells of ours that are empty are not run."""
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if x is None else str(x) for x in line] for line in theirs]
    ours = ours or [("**ours**", *[None] * (len(columns) - 1))]
    lines += [[NOT_RUN if x is None else str(x) for x in line] for line in ours]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
