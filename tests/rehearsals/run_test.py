"""A hundred evaluations in one run leak no host memory, device arrays, compiled programs, open
files or threads."""

import os

import jax
import numpy as np
import psutil
import pytest

from dgpt_jax import train
from dgpt_jax.training import loop
from tests.support import classifying, data
from tests.training import loop_test as train_test

EVALUATIONS = int(os.environ.get("EVALUATIONS", "130"))
WARM_UP = 30
MAX_GROWTH = 0.1  # MB of host memory per evaluation, malloc fragmentation included


class Meter:
    """Resources of this process after each evaluation: rows of `NAMES`."""

    NAMES = ("rss", "files", "threads", "arrays", "programs")

    def __init__(self):
        self.rows, self.compiled, self._process = [], 0, psutil.Process()
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, name: str, seconds: float, **_):
        self.compiled += name.endswith("backend_compile_duration")

    def read(self):
        rss = self._process.memory_info().rss / 1e6
        counts = self._process.num_fds(), self._process.num_threads(), len(jax.live_arrays())
        self.rows.append((rss, *counts, self.compiled))

    def after(self, rows: int) -> dict[str, np.ndarray]:
        return dict(zip(self.NAMES, np.array(self.rows[rows:]).T, strict=True))


def pretraining(root):
    """Held-out loss, kNN and figures at each step."""
    dataset = data.image_dataset(root, per_class=20)
    store = data.token_store(root, dataset, data.random_teacher(root / "teacher"))
    evals = {"heldout": str(store), "knn": str(dataset), "knn_test": "train", "figures": 4,
             "knn_resize": 18, "batch_size": 10, "every": "1 steps"}  # fmt: skip
    return train_test.settings(store, total=f"{EVALUATIONS} steps", evals=evals)


def classification(root):
    dataset = data.image_dataset(root, per_class=20)
    return classifying.settings(
        dataset, total=f"{EVALUATIONS} steps", evals={"every": "1 steps"}, checkpoint={"best": ""}
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", [pretraining, classification])
def test_evaluations_leak_nothing(task, tmp_path, monkeypatch):
    config, meter, evaluate = task(tmp_path), Meter(), loop.Loop._evaluate

    def metered(self):
        results = evaluate(self)
        meter.read()
        return results

    monkeypatch.setattr(loop.Loop, "_evaluate", metered)
    assert train.train(config, tmp_path / "run") == 0
    assert len(meter.rows) == EVALUATIONS >= 100
    usage = meter.after(WARM_UP)
    growth, _ = np.polyfit(np.arange(len(usage["rss"])), usage["rss"], 1)
    ranges = {name: (int(x.min()), int(x.max())) for name, x in usage.items()}
    print(f"{task.__name__}: {growth:.3f} MB per evaluation; {ranges}")
    assert growth < MAX_GROWTH
    assert usage["programs"][-1] == usage["programs"][0]
    for name in ("files", "threads", "arrays"):  # thread pools and figures hold some temporarily
        first, second = np.array_split(usage[name], 2)
        assert np.median(second) <= np.median(first), name
