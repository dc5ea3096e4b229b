"""Memory of plotting, comparing, reporting and resuming a run with a million logged lines.

REHEARSAL_LINES=1000000 is the full size: 0.4 GB of disk; the default is smaller.
"""

import json
import os
import shutil

import numpy as np
import pytest

from tests.support import data, watch
from tests.training import loop_test as train_test

LINES = int(os.environ.get("REHEARSAL_LINES", 50_000))
# Bytes beyond the same command on two lines: floats of about twelve metrics and their figures.
MEMORY = 60e6 + 400 * LINES
TRAIN = """
from dgpt_jax.config import roots as config, schema
from dgpt_jax import train
train.train(schema.parse(config.TrainConfig, json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories with few and with LINES lines, and the config of both."""
    root = tmp_path_factory.mktemp("logs")
    dataset = data.image_dataset(root, per_class=8)
    store = data.token_store(root, dataset, data.random_teacher(root / "teacher"))
    evals = {"heldout": str(store), "figures": 0, "batch_size": 10, "every": "2 steps"}
    config = {
        "total": "4 steps", "batch_size": 8, "dtype": "float32", "log_every": 1,
        "model": data.TINY, "data": {"path": str(store)}, "optim": {"warmup": "1 steps"},
        "evals": evals, "checkpoint": {"every": "2 steps", "best": "heldout/next"},
    }  # fmt: skip
    few, many = root / "few", root / "many"
    watch.usage_of(TRAIN, json.dumps(config), few)
    shutil.rmtree(few / "checkpoints/4")
    shutil.copytree(few, many)
    write_lines(many / "metrics.jsonl", train_test.metrics_of(few)[0])
    return few, many, json.dumps(config)


def write_lines(path, line: dict):
    """Writes LINES lines like `line`, and a held-out loss every thousand lines."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for step in range(1, LINES + 1):
            noise = rng.normal()
            values = {name: value + noise for name, value in line.items() if name != "step"}
            file.write(json.dumps({"step": step} | values) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "heldout/next": noise}) + "\n")


COMMANDS = {
    "plot": (watch.SCRIPT, "tools/plot.py", "RUN", "--out=OUT.png"),
    "compare": (watch.SCRIPT, "tools/plot.py", "--diff", "RUN", "RUN"),
    "report": (watch.SCRIPT, "tools/report.py", "RUN", "--out=OUT.html"),
    "resume": (TRAIN, "CONFIG", "RUN"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_million_lines(name, runs, tmp_path):
    few, many, config = runs
    usage = []
    for run in (few, many):
        values = {"RUN": str(run), "CONFIG": config, "OUT": str(tmp_path / run.name)}
        code, *words = COMMANDS[name]
        for key, value in values.items():
            words = [word.replace(key, value) for word in words]
        usage.append(watch.usage_of(code, *words))
    growth = usage[1]["peak"] - usage[0]["peak"]
    print(
        f"{name}: {LINES} lines, {growth / 1e6:.0f} MB over {usage[0]['peak'] / 1e6:.0f}, "
        f"{usage[1]['seconds']:.0f} s instead of {usage[0]['seconds']:.0f}"
    )
    assert growth < MEMORY
    if name == "resume":
        assert train_test.metrics_of(many)[-1]["step"] == 4
