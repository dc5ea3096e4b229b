"""Results of a model: rows of JSON with intervals, one file a model, as Markdown.

A row says what was measured (IDENTITY), the count and the accuracy with its interval, by what it
was selected, and in `how` the protocol, its source and the preprocessing. Runs add to the file; a
row that was measured before is replaced. Of a training there are rows of the last evaluation and of
the best (`epoch`), and of a grid of heads, as a `detail`, one of each.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from etils import epath

from dgpt_jax import gcs
from dgpt_jax.convert import layout
from dgpt_jax.schema import UserError

FORMAT = 1
# Rows that differ in one of these are different results; so are those of datasets at two places,
# and of a part of one (config.most).
IDENTITY = (
    "protocol", "data", "splits", "features", "k", "shots", "seed", "squash", "resize", "epoch",
    "head", "detail",
)  # fmt: skip
NAMES = ("protocol", "data")  # what every row has, as text
HIDDEN = ("how", "date", "detail", "train")  # of a row, in a table


def wilson(correct: float, of: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion, `correct` of `of`, within 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, scale = correct / of, 1 + z * z / of
    centre = (share + z * z / (2 * of)) / scale
    half = z / scale * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def row(what: Mapping, correct: float, of: int, *, selection: str, how: Mapping) -> dict:
    """A row: accuracy, low and high in percent, with 95 % between the last two.

    The interval is about the draw of the `of` test examples, not about seeds of training.
    selection: by what the number was chosen among others ("none" where it was not).
    """
    low, high = wilson(correct, of)
    return {
        **what,
        "test": of,
        "correct": correct,
        "accuracy": 100 * correct / of,
        "low": 100 * low,
        "high": 100 * high,
        "selection": selection,
        "how": dict(how),
        "date": datetime.date.today().isoformat(),
    }


def mean_over_seeds(rows: Sequence[Mapping]) -> list[dict]:
    """A row more for each group of rows that differ in nothing but the seed: mean accuracy, the
    standard deviation `sd` over the seeds, and the interval of the mean as if of one draw."""
    found: dict[str, list] = {}
    for one in rows:
        found.setdefault(_key(one, without="seed"), []).append(one)
    means = []
    for group in found.values():
        if len(group) > 1:
            correct = float(np.mean([one["correct"] for one in group]))
            first, name = group[0], f"mean of {len(group)}"
            what = {k: first[k] for k in (*IDENTITY, "train") if k in first} | {"seed": name}
            mean = row(what, correct, first["test"], selection="none", how=first["how"])
            means.append(mean | {"sd": float(np.std([one["accuracy"] for one in group], ddof=1))})
    return means


def _key(row: Mapping, without: str = "") -> str:
    found = {name: row.get(name) for name in IDENTITY if name != without}
    return json.dumps(found | {"path": _place(row), "most": row.get("how", {}).get("most")})


def _place(row: Mapping) -> str:
    """Where the dataset lies whose name may be that of others too ("images"). The sets of
    robustness have names of their own."""
    path = row.get("how", {}).get("path")
    return location(path) if path and row["protocol"] != "robustness" else ""


def location(path: str) -> str:
    """A path that means the same in every directory."""
    return path if "://" in path else os.path.abspath(path)


def default_path(checkpoint, step: int | None) -> epath.Path:
    """Where results of a checkpoint go: into a work directory, or beside weights."""
    path = epath.Path(checkpoint)
    name = "results.json" if step is None else f"results_step{step}.json"
    return path / name if path.is_dir() else path.with_name(f"{path.stem}.{name}")


def read(path) -> dict:
    """{"format", "weights", "model", "results": rows}. Raises UserError."""
    try:
        found = json.loads(epath.Path(path).read_text())
        good = {"format", "weights", "model", "results"} <= found.keys()
        good &= all(isinstance(one[name], str) for one in found["results"] for name in NAMES)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{path} is no file of results that `python -m dgpt_jax.evaluate` wrote")
    if found["format"] > FORMAT:
        raise UserError(f"{path} has format {found['format']}, this code reads {FORMAT}")
    return found


def digest(params: Mapping) -> str:
    """16 hexadecimal digits of nested arrays: their names, shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for name, array in sorted(layout.flatten(params).items()):
        array = np.ascontiguousarray(array)
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.data.cast("B"))
    return sha.hexdigest()[:16]


def refuse_another(path, weights: str, parameters: str = ""):
    """Raises UserError where `path` holds results of other weights: of other `parameters` (their
    digest), or, where one of both does not tell them, of another name."""
    if not epath.Path(path).exists():
        return
    found = read(path)
    before, known = found["weights"], found.get("parameters", "")
    same = known == parameters if known and parameters else before == weights
    if not same:
        other = "other parameters, " if before == weights else ""
        raise UserError(
            f"{path} holds results of {before}, not of {weights} ({other}digests {known or '-'}, "
            f"{parameters or '-'}): give another --out"
        )


def merge(
    path, weights: str, model: Mapping, rows: Sequence[Mapping], parameters: str = ""
) -> list[dict]:
    """Adds rows to the file, replacing those of the same IDENTITY; all rows that it then holds.

    weights: where they come from, with the step; parameters: their digest, if known. Processes that
    add to a file at the same time wait for each other, if it is near. Raises UserError where the
    file is of other weights.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        refuse_another(path, weights, parameters)
        before = read(path) if path.exists() else {"results": []}
        new = {_key(one): dict(one) for one in rows}
        rows = [one for one in before["results"] if _key(one) not in new] + list(rows)
        write(path, weights, model, rows, parameters or before.get("parameters", ""))
    return rows


def write(path, weights: str, model: Mapping, rows: Sequence[Mapping], parameters: str = ""):
    """Writes a file of these rows alone, in place of what `path` was; where that fails it stays
    what it was. Raises UserError."""
    path = epath.Path(path)
    found = {"format": FORMAT, "weights": weights, "model": dict(model)}
    found |= {"parameters": parameters} if parameters else {}
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with gcs.failures(f"{path} cannot be written"):
        try:
            half.write_text(json.dumps(found | {"results": list(rows)}, indent=1) + "\n")
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(directory: epath.Path):
    """Holds a lock on a local directory."""
    if "://" in os.fspath(directory):
        yield
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def table(rows: Sequence[Mapping]) -> str:
    """Rows as Markdown, but for those that are a `detail`."""
    rows = [one for one in rows if not one.get("detail")]
    places = {(one["data"], _place(one)) for one in rows}
    several = {name for name, _ in places if sum(name == other for other, _ in places) > 1}
    rows = [
        {**one, "data": f"{one['data']} ({_place(one)})"} if one["data"] in several else one
        for one in rows
    ]
    columns = [c for c in dict.fromkeys(c for one in rows for c in one) if c not in HIDDEN]
    columns = [c for c in columns if any(one.get(c) not in (None, "") for one in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(one.get(c)) for c in columns] for one in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
