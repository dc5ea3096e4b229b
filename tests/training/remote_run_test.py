"""A work directory on gs://, against a stand-in for it: what a run writes there is what it writes
on a local disk, and it can be killed, continued, measured, exported and drawn from there."""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dgpt_jax import (
    checkpoint,
    cli,
    metrics,
    mirror,
    records,
    replay,
    run_log,
    saving,
    shards,
    signals,
    state,
    token_codec,
    train,
    views,
)
from dgpt_jax.schema import UserError
from tests import data, gcs, processes
from tests.bad_numbers_test import poisoned, settings

TRAIN = ("-m", "dgpt_jax.train", "--config=configs/quickstart.py")


def environment(server) -> dict:
    """For gcsfs and for TensorStore."""
    return {
        "STORAGE_EMULATOR_HOST": server.url, "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with gcs.Server() as server:
        before = dict(os.environ)
        os.environ.update(environment(server))
        yield server
        for name in environment(server):
            os.environ.pop(name)
        os.environ.update(before)


def test_metrics(server, capsys):
    writer = metrics.Writer("gs://bucket/log")
    writer.config({"seed": 1})
    writer.scalars(1, {"loss": 2.0})
    assert "log/metrics.jsonl" not in server.objects  # an upload a line would be too many
    writer.copy()
    assert json.loads(server.objects["log/metrics.jsonl"]) == {"step": 1, "loss": 2.0}
    assert json.loads(server.objects["log/config.json"]) == {"seed": 1}
    before = server.requests
    writer.copy()
    assert server.requests == before  # nothing is new
    writer.scalars(2, {"loss": 1.0})
    writer.close()
    again = metrics.Writer("gs://bucket/log")
    again.scalars(3, {"loss": 0.5})
    again.close()
    curve = run_log.read("gs://bucket/log").curves["loss"]
    assert curve.as_dict() == {1: 2.0, 2: 1.0, 3: 0.5}
    boards = [name for name in server.objects if name.startswith("log/tensorboard/events")]
    assert boards and all(server.objects[name] for name in boards)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_copied_is_copied_later(server, monkeypatch, capsys):
    writer = metrics.Writer("gs://bucket/later")
    writer.scalars(1, {"loss": 2.0})
    monkeypatch.setattr(server, "forbidden", "later/metrics")
    writer.copy()
    writer.copy()
    told = capsys.readouterr().err
    assert told.count("not copied, later again: gs://bucket/later/metrics.jsonl cannot") == 1
    assert any("later/tensorboard" in name for name in server.objects)  # the others were
    monkeypatch.setattr(server, "forbidden", "")
    monkeypatch.setattr(mirror, "COPY_EVERY", 0)
    writer.copy()
    writer.scalars(2, {"loss": 1.0})  # by itself, from time to time
    assert run_log.read("gs://bucket/later").curves["loss"].as_dict() == {1: 2.0, 2: 1.0}
    writer.close()


def close_writer():
    with contextlib.closing(metrics.Writer("gs://bucket/lost")) as writer:
        writer.scalars(1, {"loss": 2.0})


def close_writer_after(error):
    with contextlib.closing(metrics.Writer("gs://bucket/lost")) as writer:
        writer.scalars(1, {"loss": 2.0})
        raise error


def close_writer_whose_board_fails():
    with contextlib.closing(metrics.Writer("gs://bucket/lost")) as writer:
        writer._boards.append(SimpleNamespace(close=lambda: 1 / 0, scalars=lambda *_: None))
        writer.scalars(1, {"loss": 2.0})


def leave_written():
    with mirror.written("gs://bucket/lost") as near:
        (near / "metrics.jsonl").write_text("{}")


def finish_profile():
    with metrics.Profile("gs://bucket/lost", (0, 1), 0) as profile:
        profile.reached(0, ())


@pytest.mark.parametrize(
    "command,code,file",
    [
        (close_writer, 1, "metrics.jsonl"),
        (partial(close_writer_after, UserError("the batch is odd")), 1, "metrics.jsonl"),
        (partial(close_writer_after, KeyboardInterrupt()), 130, "metrics.jsonl"),
        (partial(close_writer_after, signals.Terminated()), 75, "metrics.jsonl"),
        (close_writer_whose_board_fails, 1, "metrics.jsonl"),
        (leave_written, 1, "metrics.jsonl"),
        (finish_profile, 1, "0000.*.xplane.pb"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_last_copy_is_kept(server, monkeypatch, tmp_path, capsys, command, code, file):
    """A file that cannot be copied to gs:// at the end stays on the local disk, and is named."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(server, "forbidden", "lost/")
    with pytest.raises(SystemExit) as ended:
        cli.run(command)
    ending = ended.value.code
    assert code == (1 if isinstance(ending, str) else ending)
    told = f"{ending}\n{capsys.readouterr().err}"
    (line,) = [line for line in told.splitlines() if line.startswith("error: gs://bucket/lost")]
    kept = re.search(r"kept in (\S+): copy them with `gcloud storage cp -r \1/\* gs://", line)[1]
    assert len(list(Path(kept).glob(file))) == 1 and "Forbidden" in line
    assert [path.name for path in tmp_path.iterdir()] == [Path(kept).name]
    assert not any(name.startswith("lost/") for name in server.objects)
    assert ("the batch is odd" in told) == ("odd" in str(command))


def test_an_interrupted_last_copy_is_kept(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mirror.gcs, "put", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        cli.run(close_writer)
    assert ended.value.code == 130
    assert "they are kept in" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/metrics.jsonl"))) == 1


def test_a_log_that_cannot_be_read_is_not_begun_anew(server, monkeypatch):
    """Or its lines until then would be written over."""
    server.objects["unread/metrics.jsonl"] = b'{"step": 1, "loss": 2.0}\n'
    monkeypatch.setattr(
        importlib.import_module("gcsfs.retry"), "min", lambda *_: 0.01, raising=False
    )
    monkeypatch.setattr(server, "broken", "unread/metrics.jsonl")
    with pytest.raises(UserError, match="gs://bucket/unread/metrics.jsonl cannot be read"):
        metrics.Writer("gs://bucket/unread")
    assert server.objects["unread/metrics.jsonl"] == b'{"step": 1, "loss": 2.0}\n'


def test_a_shard_that_cannot_be_uploaded(server, monkeypatch):
    monkeypatch.setattr(server, "forbidden", "lost/")
    with pytest.raises(UserError, match="gs://bucket/lost/x.array_record cannot be written: "):
        shards.write("gs://bucket/lost/x.array_record", [b"record"])
    assert shards.receipts("gs://bucket/lost") == {}


def test_large_files_are_copied_less_often(server, monkeypatch):
    """So that copies take COPY_RATE bytes a second on average; before a checkpoint always."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(mirror, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(mirror, "COPY_RATE", 1000.0)
    name = "large/metrics.jsonl"
    server.objects[name] = b'{"step": 1}\n' * 20_000  # bytes: 240,000
    before = server.objects[name]
    writer = metrics.Writer("gs://bucket/large")
    writer.copy()
    assert server.objects[name] == before
    copies = []
    for clock.now in range(0, 600, 10):
        size = len(server.objects[name])
        writer.scalars(2, {"loss": 2.0})
        copies += [clock.now] * (len(server.objects[name]) > size)
    assert len(copies) == 2 and copies[1] - copies[0] >= len(before) / mirror.COPY_RATE
    writer.scalars(3, {"loss": 2.0})
    writer.copy()
    assert server.objects[name].endswith(b'{"step": 3, "loss": 2.0}\n')
    writer.close()


def test_written(server, tmp_path):
    for place in ("gs://bucket/written", tmp_path / "written"):
        with mirror.written(place) as near:
            (near / "a").write_text("b")
    assert server.objects["written/a"] == b"b" and (tmp_path / "written/a").read_text() == "b"


def test_checkpoints(server):
    tx = optax.adam(0.1)
    params = {"encoder": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    made = state.TrainState(jnp.asarray(4, jnp.int32), params, tx.init(params))
    with saving.Checkpoints("gs://bucket/saved", keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(made, {"config": {}})
    assert "saved/checkpoints/4/commit_success.txt" in server.objects
    del server.objects["saved/checkpoints/4/commit_success.txt"]
    with pytest.raises(UserError, match="gs://bucket/saved holds no finished checkpoint"):
        checkpoint.steps("gs://bucket/saved")  # a save that was killed
    server.objects["saved/checkpoints/4/commit_success.txt"] = b""
    found, metadata = checkpoint.load_params("gs://bucket/saved")
    np.testing.assert_array_equal(found["encoder"]["kernel"], params["encoder"]["kernel"])
    assert metadata["step"] == 4 and checkpoint.describe("gs://bucket/saved")[0][1] == (2, 3)


@pytest.mark.slow
def test_a_step_of_bad_numbers(server, tmp_path, monkeypatch):
    """The store and the work directory are remote: the step is written there, with its own ids."""
    monkeypatch.setattr(token_codec, "is_finite", lambda _: True)
    images = data.image_dataset(tmp_path, per_class=6)
    teacher = data.random_teacher(tmp_path / "teacher")
    store = data.token_store(tmp_path, images, teacher, codec="float16")
    poisoned(store, range(12))
    config = settings(server.add(store, "bad/tokens"), log_every=2)
    with pytest.raises(UserError, match="tools/replay.py gs://bucket/bad/run/bad_step_000000"):
        train.train(config, epath.Path("gs://bucket/bad/run"))
    (tmp_path / "step").mkdir()
    for name, content in list(server.objects.items()):
        if name.startswith("bad/run/bad_step_000000/"):
            (tmp_path / "step" / name.rpartition("/")[2]).write_bytes(content)
    step = replay.replay(tmp_path / "step")
    assert step.bad_examples() == step.ids and len(set(step.ids)) == 4
    stored = {x["id"]: views.decode_picture(x["image"]) for x in records.Split(store, "view000")}
    with np.load(tmp_path / "step/batch_0000.npz") as batch:
        for id_, image in zip(step.ids, batch["image"], strict=True):
            np.testing.assert_array_equal(stored[id_.removeprefix("view000/")], image)


@pytest.mark.slow
def test_a_run(server, tmp_path, monkeypatch):
    """Killed after its first checkpoint and continued: the losses of a run on a local disk."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # tests have one
    images = data.image_dataset(tmp_path, per_class=10)
    store = data.token_store(tmp_path, images, data.random_teacher(tmp_path / "teacher"))
    flags = {
        "data.path": store, "total": "40 steps", "batch_size": 8, "log_every": 1,
        "checkpoint.every": "4 steps", "evals.knn": "", "evals.heldout": "",
    } | {f"model.{name}": value for name, value in data.TINY.items()}  # fmt: skip
    words = [*TRAIN, *(f"--config.{name}={value}" for name, value in flags.items())]

    def start(workdir):
        return processes.start(
            [*words, f"--workdir={workdir}"], **environment(server),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )  # fmt: skip

    killed = start("gs://bucket/run")
    until = time.monotonic() + 200
    while "run/checkpoints/4/commit_success.txt" not in server.objects:
        assert killed.poll() is None and time.monotonic() < until, killed.communicate()[0][-3000:]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for workdir in ("gs://bucket/run", tmp_path / "near"):
        (output,) = processes.outputs_of([process := start(workdir)], timeout=300)
        assert process.returncode == 0, output[-3000:]
        again = workdir == "gs://bucket/run"
        assert ("continuing from step" in output) == again
        pattern = rf"first step \d+ s after .*: (\d+) of \d+ programs from {workdir}/compile_cache"
        assert (int(re.search(pattern, output)[1]) > 0) == again
    assert not (tmp_path / "gs:").exists() and not os.path.exists("gs:")
    runs = ("gs://bucket/run", tmp_path / "near")
    curves = [run_log.read(run).curves["loss"].as_dict() for run in runs]
    assert curves[0] == curves[1] and len(curves[0]) == 40

    def command(*words):
        found = subprocess.run(
            [sys.executable, *map(str, words)], cwd=processes.ROOT, capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(processes.ROOT)},
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-3000:]

    command(
        "-m", "dgpt_jax.evaluate", "--config=configs/knn_in1k.py", "--checkpoint=gs://bucket/run",
        f"--config.data={images}", "--config.train=train", "--config.test=train",
    )  # fmt: skip
    assert json.loads(server.objects["run/results_step40.json"])["results"]
    command("tools/convert.py", "gs://bucket/run", tmp_path / "timm", "--to=timm")
    assert "step 40" in (tmp_path / "timm/README.md").read_text()
    assert "| loss |" in (tmp_path / "timm/README.md").read_text()
    command("tools/plot.py", "gs://bucket/run", f"--out={tmp_path}/curves.png")
    command("tools/report_run.py", "gs://bucket/run", f"--out={tmp_path}/run.html")
    command("tools/checkpoint.py", "inspect", "gs://bucket/run")
