"""A run that has logged a million lines: it goes on, is plotted, compared, and reported.

REHEARSAL_LINES=1000000 rehearses it at full size: 0.4 GB of disk; the default is fewer.
"""

import json
import os
import shutil

import numpy as np
import pytest

from tests import data, train_test, watch

LINES = int(os.environ.get("REHEARSAL_LINES", 50_000))
# Beyond what the same needs of two lines: floats of about twelve metrics, and their drawing.
MEMORY = 60e6 + 400 * LINES
TRAIN = """
from dgpt_jax import config, schema, train
train.train(schema.parse(config.Train, json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two work directories, of few and of LINES lines, and the config of both."""
    root = tmp_path_factory.mktemp("logs")
    dataset = data.image_dataset(root, per_class=8)
    store = data.token_store(root, dataset, data.random_teacher(root / "teacher"))
    evals = {"heldout": str(store), "pictures": 0, "batch_size": 10, "every": "2 steps"}
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
    """LINES lines like this one; after every thousandth a held-out loss."""
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
    "report": (watch.SCRIPT, "tools/report_run.py", "RUN", "--out=OUT.html"),
    "resume": (TRAIN, "CONFIG", "RUN"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_million_lines(name, runs, tmp_path):
    few, many, config = runs
    needed = []
    for run in (few, many):
        places = {"RUN": str(run), "CONFIG": config, "OUT": str(tmp_path / run.name)}
        code, *words = COMMANDS[name]
        for key, place in places.items():
            words = [word.replace(key, place) for word in words]
        needed.append(watch.usage_of(code, *words))
    more = needed[1]["peak"] - needed[0]["peak"]
    print(
        f"{name}: {LINES} lines, {more / 1e6:.0f} MB over {needed[0]['peak'] / 1e6:.0f}, "
        f"{needed[1]['seconds']:.0f} s instead of {needed[0]['seconds']:.0f}"
    )
    assert more < MEMORY
    if name == "resume":
        assert train_test.metrics_of(many)[-1]["step"] == 4
