"""Results of models (evals/results.py) beside published numbers, as Markdown.

`tables` returns the same as data, for other formats.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Measured:
    """A result of ours in percent, with its 95 % interval if it has one; in Markdown it is bold."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        return f"**{self.value:.1f}**{self.suffix}"

    @property
    def suffix(self) -> str:
        """The interval behind the value."""
        return f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]" if self.interval else ""


@dataclass(frozen=True)
class Table:
    """Published lines and ours, with cells of text, Measured or None for what was not measured."""

    title: str
    columns: tuple[str, ...]
    published: list[list[str]]
    ours: list[Sequence[Any]]


def report(files: Iterable[Path | str]) -> str:
    """Three tables of published numbers and the models of these result files, then all rows of each
    model. Raises UserError on a file that is not a results file.

    Only results on complete test sets join the published ones. Cells of ours are bold and have
    their 95 % interval.
    """
    models = _models(files)
    parts = []
    for table in tables(models):
        ours = table.ours or [("**ours**", *[None] * (len(table.columns) - 1))]
        lines = [[NOT_RUN if cell is None else cell for cell in line] for line in ours]
        text = markdown.table(table.columns, [*table.published, *lines], rule=" --- ")
        parts += [f"## {table.title}", text]
    for model in models:
        parts += [f"## All results of {_name(model)}", results.table(model["results"])]
    return "\n\n".join(parts)


def tables(models: Sequence[dict]) -> list[Table]:
    """Tables of published numbers and these models, each the content of a results file."""

    def table(name: str, title: str, columns: Sequence[str], ours: Callable[[dict], list]) -> Table:
        first, *others = columns
        rows = published.rows(name, ("name", *others, "source"))
        lines = [line for model in models for line in ours(model)]
        return Table(title, (first, *others, "source"), rows, lines)

    return [
        table(
            "finetuned",
            "Fine-tuned on ImageNet-1K, 224 pixels, top-1",
            ("method", "pretraining", *published.SIZES),
            _finetuned,
        ),
        table(
            "robustness",
            "Robustness of fine-tuned weights, top-1; C: plain mean error, lower is better",
            ("weights", *published.ROBUSTNESS_COLUMNS),
            _robustness,
        ),
        table(
            "frozen",
            "Frozen features, ImageNet-1K, top-1; kNN: k = 20",
            ("encoder", *published.FROZEN_COLUMNS),
            _frozen,
        ),
    ]


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


def _cell(row: dict | None, key: str = "accuracy") -> Measured | None:
    if row is None:
        return None
    return Measured(row[key], (row["low"], row["high"]) if "low" in row else None)


def _finetuned(model: dict) -> list[Sequence]:
    """A line for each resizing and each selection of the epoch: the best one on the test images is
    an optimistic choice."""
    lines = []
    for row in model["results"]:
        finetuned = row["protocol"] == "finetune" or row["data"] == "imagenet"  # of robustness
        if finetuned and row.get("test") == VALIDATION:
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
        complete = row.get("test") == VALIDATION and not row.get("detail")
        if columns and complete and row.get("shots", "all") == "all" and row.get("k", 20) == 20:
            selected = row["protocol"] != "knn"  # kNN has nothing to select
            source = f"ours, {row['protocol']}, {_selection(row)}" if selected else "ours"
            name = f"{_name(model)}, {row['features']}"
            lines.setdefault((name, source), {})[columns[0]] = row
    return [
        (name, *(_cell(rows.get(c)) for c in published.FROZEN_COLUMNS), source)
        for (name, source), rows in lines.items()
    ]
