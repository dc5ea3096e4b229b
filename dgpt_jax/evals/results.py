"""Results of a model: rows with confidence intervals, as one JSON file per model and as Markdown.

A row has identifying fields (IDENTITY), count, accuracy and its interval, the selection, and under
`how` the protocol's source, parameters and preprocessing. Runs add rows to the file, replacing
those of the same identity. A training has rows of its last and its best evaluation (`epoch`), and
for a grid of heads a `detail` row for each.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import markdown
from dgpt_jax.storage import atomic
from dgpt_jax.weights import hub, mapping

FORMAT = 1
# Rows that differ in one of these are different results; so are rows of datasets at different paths
# and of a subset of one (config.max_examples).
IDENTITY = (
    "protocol", "data", "splits", "features", "k", "shots", "seed", "squash", "resize", "epoch",
    "head", "detail",
)  # fmt: skip
NAMES = ("protocol", "data")  # text fields that every row has
HIDDEN = ("how", "date", "detail", "train")  # fields not shown in tables


def wilson(correct: float, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of the proportion correct / total, within 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, scale = correct / total, 1 + z * z / total
    center = (share + z * z / (2 * total)) / scale
    half = z / scale * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def row(
    identity: Mapping[str, Any], correct: float, total: int, *, selection: str, how: Mapping
) -> dict:
    """A row; accuracy and its 95 % interval from `low` to `high` are in percent.

    The interval covers the sampling of the `total` test examples, not seeds of training. selection:
    criterion by which the result was chosen among others, or "none".
    """
    low, high = wilson(correct, total)
    return {
        **identity,
        "test": total,
        "correct": correct,
        "accuracy": 100 * correct / total,
        "low": 100 * low,
        "high": 100 * high,
        "selection": selection,
        "how": dict(how),
        "date": datetime.date.today().isoformat(),
    }


def mean_over_seeds(rows: Sequence[Mapping]) -> list[dict]:
    """A row for each group of rows that differ in the seed alone: mean accuracy, its interval as
    for one run, and the standard deviation `sd` over the seeds."""
    groups: dict[str, list] = {}
    for r in rows:
        groups.setdefault(_key(r, without="seed"), []).append(r)
    means = []
    for group in groups.values():
        if len(group) > 1:
            correct = float(np.mean([r["correct"] for r in group]))
            first, seed = group[0], f"mean of {len(group)}"
            identity = {k: first[k] for k in (*IDENTITY, "train") if k in first} | {"seed": seed}
            mean = row(identity, correct, first["test"], selection="none", how=first["how"])
            means.append(mean | {"sd": float(np.std([r["accuracy"] for r in group], ddof=1))})
    return means


def _key(row: Mapping, without: str = "") -> str:
    fields = {name: row.get(name) for name in IDENTITY if name != without}
    return json.dumps(fields | {"path": _location(row), "most": row.get("how", {}).get("most")})


def _location(row: Mapping) -> str:
    """Location of a dataset whose name may not be unique ("images"); "" for the robustness sets,
    whose names are."""
    path = row.get("how", {}).get("path")
    return location(path) if path and row["protocol"] != "robustness" else ""


def location(path: str) -> str:
    """An absolute path or URL."""
    return path if "://" in path else os.path.abspath(path)


def default_path(checkpoint: epath.PathLike, step: int | None) -> epath.Path:
    """Results file of a checkpoint: in a work directory, beside a weights file, or, of weights on
    the Hugging Face hub, in the current directory."""
    name = "results.json" if step is None else f"results_step{step}.json"
    if hub.is_name(checkpoint):
        repository = os.fspath(checkpoint).removeprefix(hub.PREFIX).replace("/", "--")
        return epath.Path(f"{repository}.{name}")
    path = epath.Path(checkpoint)
    return path / name if path.is_dir() else path.with_name(f"{path.stem}.{name}")


def read(path: epath.PathLike) -> dict[str, Any]:
    """{"format", "weights", "model", "results": rows}. Raises UserError on anything else."""
    content = {}
    try:
        content = json.loads(epath.Path(path).read_text())
        valid = {"format", "weights", "model", "results"} <= content.keys()
        valid &= all(isinstance(r[name], str) for r in content["results"] for name in NAMES)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        valid = False
    if not valid:
        raise UserError(f"{path} is not a results file of `{invocation.command('evaluate')}`")
    if content["format"] > FORMAT:
        raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}")
    return content


def digest(params: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, a hash of names, shapes, dtypes and bytes of nested arrays."""
    sha = hashlib.sha256()
    for name, array in sorted(mapping.flatten(params).items()):
        array = np.ascontiguousarray(array)
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.data.cast("B"))
    return sha.hexdigest()[:16]


def refuse_another(path: epath.PathLike, weights: str, parameters: str = ""):
    """Raises UserError if `path` holds results of other weights: the digests of their parameters
    differ, or, if one is missing, their names."""
    if not epath.Path(path).exists():
        return
    content = read(path)
    name, saved = content["weights"], content.get("parameters", "")
    same = saved == parameters if saved and parameters else name == weights
    if not same:
        other = "other parameters, " if name == weights else ""
        raise UserError(
            f"{path} holds results of {name}, not of {weights} ({other}digests {saved or '-'}, "
            f"{parameters or '-'}): choose another --out"
        )


def merge(
    path: epath.PathLike,
    weights: str,
    model: Mapping,
    rows: Sequence[Mapping],
    parameters: str = "",
) -> list[dict]:
    """Adds rows to the file, replacing those of the same IDENTITY; returns all of its rows.

    weights: source and step; parameters: their digest, if known. Concurrent processes take turns by
    a lock on local disks. Raises UserError if the file is of other weights.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.parent):
        refuse_another(path, weights, parameters)
        saved: dict[str, Any] = read(path) if path.exists() else {"results": []}
        new = set(map(_key, rows))
        merged = [r for r in saved["results"] if _key(r) not in new] + list(rows)
        write(path, weights, model, merged, parameters or saved.get("parameters", ""))
    return merged


def write(
    path: epath.PathLike,
    weights: str,
    model: Mapping,
    rows: Sequence[Mapping],
    parameters: str = "",
):
    """Replaces `path` by a file of these rows alone, atomically. Raises UserError."""
    path = epath.Path(path)
    content = {"format": FORMAT, "weights": weights, "model": dict(model)}
    content |= {"parameters": parameters} if parameters else {}
    atomic.write_text(path, json.dumps(content | {"results": list(rows)}, indent=1) + "\n")


@contextlib.contextmanager
def _lock(directory: epath.Path) -> Iterator[None]:
    """Holds a lock on a local directory; none on a remote one."""
    if "://" in os.fspath(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def table(rows: Sequence[Mapping]) -> str:
    """Markdown of rows without `detail`; datasets of the same name show their location."""
    rows = [r for r in rows if not r.get("detail")]
    locations = {(r["data"], _location(r)) for r in rows}
    ambiguous = {name for name, _ in locations if sum(name == n for n, _ in locations) > 1}
    rows = [
        {**r, "data": f"{r['data']} ({_location(r)})"} if r["data"] in ambiguous else r
        for r in rows
    ]
    columns = [c for c in dict.fromkeys(c for r in rows for c in r) if c not in HIDDEN]
    columns = [c for c in columns if any(r.get(c) not in (None, "") for r in rows)]
    cells = ([_cell(r.get(c)) for c in columns] for r in rows)
    return markdown.table(columns, cells, rule=" --- ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
