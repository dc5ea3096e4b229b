"""Intervals against SciPy, merged results files, and the report."""

import errno
import json
import multiprocessing
import os
import sys

import numpy as np
import pytest
from scipy.stats import binomtest

from dgpt_jax import cli
from dgpt_jax.errors import UserError
from dgpt_jax.evals import published, report, results


@pytest.mark.parametrize("of", [1, 7, 360, 50_000])
def test_intervals_equal_scipys(of):
    for correct in sorted({0, 1, of // 3, of - 1, of}):
        for level in (0.95, 0.99):
            theirs = binomtest(correct, of).proportion_ci(level, method="wilson")
            np.testing.assert_allclose(results.wilson(correct, of, level), theirs, atol=1e-12)


def knn_row(correct=30, how=None, **what):
    what = {"protocol": "knn", "data": "d", "features": "cls", "k": 20, "shots": "all"} | what
    return results.row(what, correct, 40, selection="none", how=how or {"source": "x"})


def test_a_row_has_counts_intervals_and_source():
    row = knn_row(seed=None)
    assert row["accuracy"] == 75 and row["correct"] == 30 and row["test"] == 40
    low, high = binomtest(30, 40).proportion_ci(method="wilson")
    assert (row["low"], row["high"]) == pytest.approx((100 * low, 100 * high))
    assert row["selection"] == "none" and row["how"] == {"source": "x"} and row["date"]


def test_datasets_of_the_same_name_are_different_results(tmp_path, monkeypatch):
    """Neither another dataset nor a subset replaces a result."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.json"
    rows = [knn_row(correct, how={"path": data}) for correct, data in ((20, "/a/d"), (21, "d"))]
    results.merge(path, "RUN", {}, rows)
    results.merge(path, "RUN", {}, [knn_row(22, how={"path": str(tmp_path / "d")})])
    merged = results.merge(path, "RUN", {}, [knn_row(23, how={"path": "/a/d", "most": 40})])
    assert [row["correct"] for row in merged] == [20, 22, 23]
    table = results.table(merged)
    assert "| d (/a/d) |" in table and f"| d ({tmp_path}/d) |" in table
    assert "| d |" in results.table(merged[:1])


def test_mean_over_seeds():
    rows = [knn_row(c, seed=s, shots=5, train=10) for s, c in enumerate((20, 30, 34))]
    rows += [knn_row(c, seed=s, shots=1) for s, c in enumerate((4, 8))] + [knn_row(seed=None)]
    five, one = results.mean_over_seeds(rows)
    assert five["accuracy"] == pytest.approx(100 * 28 / 40) and five["seed"] == "mean of 3"
    assert five["sd"] == pytest.approx(np.std([50, 75, 85], ddof=1))
    assert (five["shots"], five["train"], one["shots"], one["seed"]) == (5, 10, 1, "mean of 2")


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        (("run, step 5", "aa"), ("/home/run, step 5", "aa"), False),
        (("run, step 5", "aa"), ("run, step 5", "bb"), True),  # from another directory
        (("run, step 5", ""), ("run, step 5", "aa"), False),  # an earlier version's file
        (("run, step 5", ""), ("other, step 5", "aa"), True),
        (("run, step 5", "aa"), ("other, step 5", ""), True),
    ],
)
def test_parameters_identify_a_model(tmp_path, before, now, refused):
    path = tmp_path / "r.json"
    results.merge(path, before[0], {}, [knn_row(20)], before[1])
    if refused:
        with pytest.raises(UserError, match="run, step 5"):
            results.refuse_another(path, *now)
    else:
        results.merge(path, now[0], {}, [knn_row(21, k=10)], now[1])
        assert len(results.read(path)["results"]) == 2
        assert results.read(path)["parameters"] == "aa"


def test_the_digest_of_parameters():
    one = {"a": {"w": np.arange(6, dtype=np.float32)}, "b": np.zeros((), np.float32)}
    others = [
        {"a": {"w": np.arange(6, dtype=np.float32)[::-1]}, "b": one["b"]},
        {"a": {"w": one["a"]["w"].reshape(2, 3)}, "b": one["b"]},
        {"a": {"v": one["a"]["w"]}, "b": one["b"]},
        {"a": {"w": one["a"]["w"].astype(np.int32)}, "b": one["b"]},
    ]
    assert len({results.digest(tree) for tree in (one, *others)}) == 5
    again = {"b": np.zeros((), np.float32), "a": {"w": np.arange(12, dtype=np.float32)[:6]}}
    assert results.digest(again) == results.digest(one)


def add_rows(path, number: int):
    for i in range(20):
        results.merge(path, "run, step 5", {}, [knn_row(20, k=100 * number + i)])


def test_concurrent_merges(tmp_path):
    path = tmp_path / "r.json"
    context = multiprocessing.get_context("spawn")
    adding = [context.Process(target=add_rows, args=(path, number)) for number in range(3)]
    for process in adding:
        process.start()
    for process in adding:
        process.join()
    assert len(results.read(path)["results"]) == 60


def test_results_are_merged(tmp_path):
    path, model = tmp_path / "r.json", {"width": 8}
    results.merge(path, "RUN, step 5", model, [knn_row(20), knn_row(21, k=10)])
    results.merge(path, "RUN, step 5", model, [knn_row(22, protocol="fewshot", k=None)])
    rows = results.merge(path, "RUN, step 5", model, [knn_row(23)])  # k = 20 again
    assert [(r["protocol"], r["k"], r["correct"]) for r in rows] == [
        ("knn", 10, 21), ("fewshot", None, 22), ("knn", 20, 23),
    ]  # fmt: skip
    content = results.read(path)
    assert content["results"] == rows and content["model"] == model
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(UserError, match="RUN, step 5.* RUN, step 6.*--out"):
        results.merge(path, "RUN, step 6", model, [])
    assert results.read(path) == content
    for row in (5, {}, {"protocol": None, "data": "d"}, {"protocol": "knn"}):
        path.write_text(json.dumps(content | {"results": [row]}))
        with pytest.raises(UserError, match="r.json"):
            results.read(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="r.json"):
        results.read(path)
    path.unlink()
    with pytest.raises(UserError, match="r.json"):
        results.read(path)


@pytest.mark.parametrize("add", [results.merge, results.write])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, add):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "r.json"
    add(path, "RUN, step 5", {}, [knn_row(20)])
    before = path.read_bytes()
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="r.json.*No space"):
            patch.setattr(os, function, full)
            add(path, "RUN, step 5", {}, [knn_row(21)])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_default_path(tmp_path):
    assert results.default_path(tmp_path, 7) == tmp_path / "results_step7.json"
    file = tmp_path / "model.safetensors"
    assert results.default_path(file, None) == tmp_path / "model.results.json"
    hub = results.default_path("hf:org/name@main", None)
    assert hub.as_posix() == "org--name@main.results.json"


def test_tables_omit_details():
    rows = [knn_row(), knn_row(k=10) | {"detail": True}, knn_row(protocol="linear", k=None)]
    lines = results.table(rows).splitlines()
    assert len(lines) == 4 and "source" not in lines[0]
    columns = [x.strip() for x in lines[0].split("|")[1:-1]]
    assert {"protocol", "k", "accuracy", "low", "high", "selection"} <= set(columns)
    cells = [x.strip() for x in lines[3].split("|")[1:-1]]
    assert cells[columns.index("k")] == "" and cells[columns.index("accuracy")] == "75"


def full_row(protocol, correct, **what):
    what = {"protocol": protocol, "data": "imagenet2012"} | what
    return results.row(what, correct, 50_000, selection="none", how={})


def test_the_report(tmp_path, monkeypatch, capsys):
    model = {"width": 768, "depth": 12, "heads": 12, "patch": 16}
    robust = {"data": "imagenet", "squash": False}
    rows = [
        full_row("knn", 38_000, features="cls", k=20, shots="all"),
        full_row("knn", 10, features="cls", k=10, shots="all"),
        full_row("knn", 20, features="cls", k=20, shots=5),
        full_row("finetune", 43_100, epoch=100),
        full_row("robustness", 43_000, **robust),
        full_row("robustness", 42_900, **robust | {"squash": True}),
        full_row("robustness", 5, data="imagenet_a", squash=False) | {"incomplete": "7 of 7500"},
        {"protocol": "robustness", "data": "imagenet_c", "test": 1, "accuracy": 69.0,
         "mean error": 31.0, "mCE": 40.0, "selection": "none"},
        knn_row(39),  # another dataset
    ]  # fmt: skip
    results.merge(tmp_path / "r.json", "RUN, step 5", model, rows)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "r.json")])
    from dgpt_jax.commands import results as tool

    cli.run(tool.main)
    shown = capsys.readouterr().out
    tables = [part.strip().splitlines() for part in shown.split("## ")[1:]]
    ours = [[line for line in table if "RUN" in line] for table in tables]
    start, end = (
        "| RUN, step 5 (B/16) | ours | not run | ",
        " | not run | not run | selection: none",
    )
    assert ours[0] == [
        f"{start}**86.2** [85.9, 86.5]{end} |",
        f"{start}**86.0** [85.7, 86.3]{end} |",
        f"{start}**85.8** [85.5, 86.1]{end}, squashed |",
    ]
    none = " | not run" * 4
    assert ours[1] == [
        "| RUN, step 5 (B/16) | **86.0** [85.7, 86.3]" + none + " | **31.0** | not run | not run "
        "| ours |",
        "| RUN, step 5 (B/16) | **85.8** [85.5, 86.1]" + none + " | **31.0** | not run | not run "
        "| ours, squashed |",
    ]
    assert ours[2] == [
        "| RUN, step 5 (B/16), cls | **76.0** [75.6, 76.4] | not run | not run | ours |"
    ]
    assert "| D-iGPT-B | 86.2 | 76.4 | 89.6 | 56.3 | 64.3 | 29.9 | 48.5 | 31.1 | paper |" in shown
    assert shown.strip().splitlines()[-1].startswith("next: ")


def test_the_report_without_results():
    shown = report.report([])
    assert shown.count("| **ours** |") == 3 and shown.count("not run") > 15


def test_published_tables_have_their_columns():
    for table, columns, count in (
        ("finetuned", published.SIZES, 18),
        ("robustness", published.ROBUSTNESS_COLUMNS, 17),
        ("frozen", published.FROZEN_COLUMNS, 21),
    ):
        rows = published.rows(table, ("name", *columns, "source"))
        assert len(rows) == count
        for name, *cells, source in rows:
            assert name and source and any(cells), name
            # "83.8–84.0" is a range
            numbers = [float(x) for cell in cells if cell for x in cell.split("–")]
            assert all(20 < x < 100 for x in numbers), name
    assert tuple(report.SETS) == published.ROBUSTNESS_COLUMNS
