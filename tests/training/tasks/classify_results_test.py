"""Results file of fine-tuning, and its rows in the report."""

import json

import pytest

from dgpt_jax.evals import classification, report, results
from dgpt_jax.training import optimizer, tasks
from tests.support.classifying import settings
from tests.support.data import image_dataset


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Fine-tuning on 24 images of two classes."""
    return tasks.open_task(settings(image_dataset(tmp_path_factory.mktemp("rows"), per_class=12)))


def write_log(workdir, curves: dict[str, dict[int, float]]):
    lines = [
        json.dumps({"step": step, name: value})
        for name, curve in curves.items()
        for step, value in curve.items()
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(sorted(lines, key=_step)) + "\n")


def _step(line: str) -> int:
    return json.loads(line)["step"]


def test_rows_of_last_and_best_epoch_with_both_resizings(task, tmp_path):
    """The best steps may differ; accuracies are converted back to counts."""
    write_log(tmp_path, {
        "loss": {1: 0.7, 9: 0.1},
        "val/top1": {3: 20 / 24, 6: 21 / 24, 9: 19 / 24},
        "val/top1_squash": {3: 23 / 24, 6: 21 / 24, 9: 18 / 24},
    })  # fmt: skip
    (line,) = classification.save_results(task, tmp_path)
    path = tmp_path / "results_step9.json"
    assert str(path) in line
    record = results.read(path)
    assert record["weights"] == f"{tmp_path}, step 9" and record["model"]["width"] == 24
    rows = record["results"]
    assert [(r["epoch"], r["step"], r["squash"], r["correct"], r["test"]) for r in rows] == [
        ("last", 9, False, 19, 24), ("best", 6, False, 21, 24),
        ("last", 9, True, 18, 24), ("best", 3, True, 23, 24),
    ]  # fmt: skip
    low, high = results.wilson(19, 24)
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((100 * low, 100 * high))
    selection = {row["epoch"]: row["selection"] for row in rows}
    assert selection == {"last": "none", "best": "epoch, on the test images"}
    for row in rows:
        assert (row["protocol"], row["seed"], row["resize"], row["features"]) == (
            "finetune", 0, 18, "mean",
        )  # fmt: skip
        assert row["splits"] == "train → train" and row["data"] == "images"
        assert row["how"]["batch_size"] == 8 and row["how"]["ema"] == 0.8
    # Other results of the same weights stay; the rows of the same run are replaced.
    other = results.row({"protocol": "robustness", "data": "x"}, 1, 2, selection="none", how={})
    results.merge(path, record["weights"], record["model"], [other])
    classification.save_results(task, tmp_path)
    assert len(results.read(path)["results"]) == 5
    results.merge(tmp_path / "b.json", "another", record["model"], [])
    (tmp_path / "b.json").rename(path)
    assert "results were not written" in classification.save_results(task, tmp_path)[0]


def test_counts_are_exact(task, tmp_path, monkeypatch):
    """1/49 times 49 is less than 1."""
    monkeypatch.setattr(classification.tfds_dataset, "Split", lambda *_: range(49))
    for hits in range(1, 50):
        write_log(tmp_path, {"val/top1": {6: hits / 49}})
        assert classification.result_rows(task, tmp_path)[0]["correct"] == hits


def test_the_report_compares_them_with_published_results(task, tmp_path):
    """With the number of images of ImageNet; a probe and kNN of one encoder from two files."""
    write_log(tmp_path, {"val/top1": {3: 0.5, 6: 0.25}, "val/top1_squash": {3: 0.5, 6: 0.75}})
    model = {"width": 768, "depth": 12, "heads": 12, "patch": 16}
    imagenet = {"test": 50_000, "low": 1.0, "high": 2.0}
    tuned = [row | imagenet for row in classification.result_rows(task, tmp_path)]
    results.merge(tmp_path / "tuned.json", "TUNED, step 6", model, tuned)
    probe = [row | imagenet | {"protocol": "attentive_aim", "features": "patches"} for row in tuned]
    probe += [probe[0] | {"head": "lr1", "detail": True, "accuracy": 1.0}]
    results.merge(tmp_path / "probe.json", "RUN, step 5", model, probe)
    knn = {"protocol": "knn", "data": "d", "features": "cls", "k": 20, "shots": "all"}
    knn = results.row(knn, 40_000, 50_000, selection="none", how={})
    results.merge(tmp_path / "knn.json", "RUN, step 5", model, [knn])
    names = ("tuned.json", "probe.json", "knn.json")
    text = report.report([tmp_path / name for name in names])
    fine, _, frozen, *files = (section.splitlines() for section in text.split("## ")[1:])
    lines = [line for line in fine if "TUNED" in line]
    assert [line.split("|")[4].split()[0] for line in lines] == [
        "**25.0**", "**50.0**", "**75.0**", "**75.0**",
    ]  # fmt: skip
    assert "last epoch, selection: none |" in lines[0]
    assert "best epoch, selection: epoch, on the test images, squashed |" in lines[3]
    lines = [line for line in frozen if "RUN" in line]
    assert len(lines) == 5 and "**80.0**" in lines[4] and lines[4].endswith("| ours |")
    assert "| not run | not run | **25.0** [1.0, 2.0] | ours, attentive_aim, last" in lines[0]
    assert [file[0] for file in files] == [
        "All results of TUNED, step 6 (B/16)", "All results of RUN, step 5 (B/16)",
    ]  # fmt: skip
    assert "lr1" not in text


def test_peaks_of_a_grid(task):
    assert optimizer.peak_learning_rates(task.config.optim, 512) == pytest.approx(0.1)
