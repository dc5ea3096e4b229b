"""Files of earlier versions (golden/formats/VERSION) are read as before."""

import json
import os
import shutil

import numpy as np
import pytest

from dgpt_jax import train
from dgpt_jax.config import roots as config_lib
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_store
from dgpt_jax.evals import report
from dgpt_jax.training import bad_step_replay
from dgpt_jax.training.tasks import pretrain
from tests.support import formats
from tests.support.data import TINY
from tests.support.paths import GOLDEN

VERSIONS = sorted((GOLDEN / "formats").iterdir())
TRAIN = dict(
    total="6 steps", batch_size=8, dtype="float32", log_every=1, model=TINY,
    data={"path": "tokens", "threads": 2},
    optim={"blr": 0.064, "warmup": "2 steps"},
    checkpoint={"every": "3 steps"},
)  # fmt: skip
RUNS = {
    "run": {},
    "ema": {"optim": TRAIN["optim"] | {"ema": 0.9}},
    "tuned": {
        "task": "classify", "data": {"path": "images", "threads": 2},
        "classify": {"num_classes": 2, "mixup_group_size": 4},
        "init": {"weights": "run"},
        "optim": TRAIN["optim"] | {"layer_decay": 0.7},
    },
}  # fmt: skip


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def directory(request, tmp_path, monkeypatch):
    """A copy of a version's files, as the working directory, since their paths are relative."""
    copy = tmp_path / "formats"
    shutil.copytree(request.param, copy)
    monkeypatch.chdir(copy)
    return copy


def assert_close(actual, expected, path=""):
    """Asserts equality up to rounding of floats."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_close(actual[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, float) or (isinstance(expected, list) and path.count("/") > 1):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-5, err_msg=path)
    else:
        assert actual == expected, path


def test_all_formats_are_read_as_before(directory):
    expected = json.loads((directory / "expected.json").read_text())
    actual = json.loads(json.dumps(formats.summary(directory)))
    exact = ("images", "tokens", "steps", "results")
    assert {x: actual[x] for x in exact[:1]} == {x: expected[x] for x in exact[:1]}
    assert actual["steps"] == expected["steps"] and actual["results"] == expected["results"]
    decoded = [side["tokens"].pop("decoded") for side in (actual, expected)]
    np.testing.assert_allclose(*decoded, rtol=1e-6)
    assert actual["tokens"] == expected["tokens"]
    for name in ("features", "losses", "logits", "curves"):
        assert_close(actual[name], expected[name], f"/{name}/")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "ema", "tuned"])
def test_a_run_resumes_with_the_same_losses(directory, name, capsys):
    """From the checkpoint of step 3, against the run's own log, which goes to step 6."""
    expected = formats.curves(directory / name)["loss"]
    os.truncate(directory / name / "metrics.jsonl", 0)
    assert train.train(parse(config_lib.TrainConfig, TRAIN | RUNS[name]), directory / name) == 0
    assert "step 3 does not record its data" in capsys.readouterr().err
    resumed = formats.curves(directory / name)["loss"]
    assert list(resumed) == ["4", "5", "6"]
    for step, loss in resumed.items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step


def test_a_bad_step_is_replayed(directory):
    (dump,) = directory.glob("bad/bad_step_*")
    replayed = bad_step_replay.replay(dump)
    assert replayed.now["loss"] == pytest.approx(replayed.before["loss"], rel=1e-4, nan_ok=True)
    assert len(replayed.ids) == 8


def test_results_and_configs_are_read(directory):
    for name in RUNS:
        assert json.loads((directory / name / "config.json").read_text())["total"] == "6 steps"
    files = [str(path) for path in directory.glob("*/results_*.json")]
    assert len(files) == 2
    text = report.report(files)
    assert all(name in text for name in ("run, step 3", "tuned, step 6"))


def test_a_store_of_format_2_gives_the_same_training_in_format_3(directory):
    """The same examples and targets, byte for byte: its metadata are written again."""
    stored = json.loads((directory / "tokens/token_store.json").read_text())
    if stored["format"] != token_store.OLDEST:
        pytest.skip("a store of format 3")
    config = parse(config_lib.TrainConfig, TRAIN)
    before = pretrain.open_pretrain(config)
    token_store.StoreInfo.load("tokens").save("tokens")
    assert json.loads((directory / "tokens/token_store.json").read_text())["format"] == 3
    after = pretrain.open_pretrain(config)
    assert before.abstract_example() == after.abstract_example()
    assert before.examples.identity() == after.examples.identity()
    assert before.target.codec is not None and after.target.codec is not None
    assert before.target.codec.equals(after.target.codec)
    assert (before.target.grid, before.target.cls) == (after.target.grid, after.target.cls)
    for position in range(2 * len(before.examples)):
        old, new = (x.examples(position, position % len(x.examples)) for x in (before, after))
        assert old.keys() == new.keys()
        assert all(old[name].tobytes() == new[name].tobytes() for name in old)
