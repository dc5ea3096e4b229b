"""A work directory on an emulated gs://: a run writes the same files as on a local disk, and can be
killed, resumed, evaluated, exported and plotted from there."""

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

from dgpt_jax import cli, train
from dgpt_jax.data import image_ops, token_codec
from dgpt_jax.distributed import preemption
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics, metrics_log
from dgpt_jax.storage import array_record_shards, orbax_checkpoint, remote_sync, tfds_dataset
from dgpt_jax.training import bad_step_replay, checkpointing, train_step
from tests.support import data, gcs, processes
from tests.training.bad_numbers_test import poisoned, settings

TRAIN = ("-m", "dgpt_jax.train", "--config=configs/quickstart.py")


def environment(server) -> dict:
    """For gcsfs and TensorStore."""
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
    assert "log/metrics.jsonl" not in server.objects  # not uploaded for every line
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
    curve = metrics_log.read("gs://bucket/log").curves["loss"]
    assert curve.as_dict() == {1: 2.0, 2: 1.0, 3: 0.5}
    boards = [name for name in server.objects if name.startswith("log/tensorboard/events")]
    assert boards and all(server.objects[name] for name in boards)
    assert capsys.readouterr().err == ""


def test_failed_uploads_are_retried_later(server, monkeypatch, capsys):
    writer = metrics.Writer("gs://bucket/later")
    writer.scalars(1, {"loss": 2.0})
    monkeypatch.setattr(server, "forbidden", "later/metrics")
    writer.copy()
    writer.copy()
    log = capsys.readouterr().err
    assert log.count("gs://bucket/later/metrics.jsonl") == 1
    assert any("later/tensorboard" in name for name in server.objects)  # other files were uploaded
    monkeypatch.setattr(server, "forbidden", "")
    monkeypatch.setattr(remote_sync, "MIN_INTERVAL", 0)
    writer.copy()
    writer.scalars(2, {"loss": 1.0})  # syncs when due
    assert metrics_log.read("gs://bucket/later").curves["loss"].as_dict() == {1: 2.0, 2: 1.0}
    writer.close()


def close_writer():
    with contextlib.closing(metrics.Writer("gs://bucket/lost")) as writer:
        writer.scalars(1, {"loss": 2.0})


def close_writer_after(error):
    with contextlib.closing(metrics.Writer("gs://bucket/lost")) as writer:
        writer.scalars(1, {"loss": 2.0})
        raise error


def close_writer_whose_tracker_fails():
    with contextlib.closing(metrics.Writer("gs://bucket/lost")) as writer:
        writer._trackers.append(SimpleNamespace(close=lambda: 1 / 0, scalars=lambda *_: None))
        writer.scalars(1, {"loss": 2.0})


def fail_written():
    with remote_sync.output_directory("gs://bucket/lost") as staging:
        (staging / "metrics.jsonl").write_text("{}")


def finish_profile():
    with metrics.Profile("gs://bucket/lost", (0, 1), 0) as profile:
        profile.reached(0, ())


@pytest.mark.parametrize(
    "command,code,file",
    [
        (close_writer, 1, "metrics.jsonl"),
        (partial(close_writer_after, UserError("the batch is odd")), 1, "metrics.jsonl"),
        (partial(close_writer_after, KeyboardInterrupt()), 130, "metrics.jsonl"),
        (partial(close_writer_after, preemption.Terminated()), 75, "metrics.jsonl"),
        (close_writer_whose_tracker_fails, 1, "metrics.jsonl"),
        (fail_written, 1, "metrics.jsonl"),
        (finish_profile, 1, "0000.*.xplane.pb"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_files_of_a_failed_last_upload_are_kept(
    server, monkeypatch, tmp_path, capsys, command, code, file
):
    """They stay on the local disk, and the error names their directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(server, "forbidden", "lost/")
    with pytest.raises(SystemExit) as exit_info:
        cli.run(command)
    exit_code = exit_info.value.code
    assert code == (1 if isinstance(exit_code, str) else exit_code)
    log = f"{exit_code}\n{capsys.readouterr().err}"
    (line,) = [line for line in log.splitlines() if line.startswith("error: gs://bucket/lost")]
    directory = Path(re.search(r"`gcloud storage cp -r (\S+)/\* gs://", line)[1])
    assert len(list(directory.glob(file))) == 1 and "Forbidden" in line
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    assert not any(name.startswith("lost/") for name in server.objects)
    assert ("the batch is odd" in log) == ("odd" in str(command))


def test_files_of_an_interrupted_last_upload_are_kept(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote_sync.gcs, "put", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as exit_info:
        cli.run(close_writer)
    assert exit_info.value.code == 130
    assert "gcloud storage cp" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/metrics.jsonl"))) == 1


def test_an_unreadable_log_is_not_overwritten(server, monkeypatch):
    server.objects["unread/metrics.jsonl"] = b'{"step": 1, "loss": 2.0}\n'
    monkeypatch.setattr(
        importlib.import_module("gcsfs.retry"), "min", lambda *_: 0.01, raising=False
    )
    monkeypatch.setattr(server, "broken", "unread/metrics.jsonl")
    with pytest.raises(UserError, match="gs://bucket/unread/metrics.jsonl"):
        metrics.Writer("gs://bucket/unread")
    assert server.objects["unread/metrics.jsonl"] == b'{"step": 1, "loss": 2.0}\n'


def test_a_failed_upload_of_a_shard_is_a_user_error(server, monkeypatch):
    monkeypatch.setattr(server, "forbidden", "lost/")
    with pytest.raises(UserError, match="gs://bucket/lost/x.array_record"):
        array_record_shards.write("gs://bucket/lost/x.array_record", [b"record"])
    assert array_record_shards.shard_infos("gs://bucket/lost") == {}


def test_large_files_are_uploaded_less_often(server, monkeypatch):
    """At MAX_RATE bytes/s on average, and before every checkpoint."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(remote_sync, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(remote_sync, "MAX_RATE", 1000.0)
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
    assert len(copies) == 2 and copies[1] - copies[0] >= len(before) / remote_sync.MAX_RATE
    writer.scalars(3, {"loss": 2.0})
    writer.copy()
    assert server.objects[name].endswith(b'{"step": 3, "loss": 2.0}\n')
    writer.close()


def test_written(server, tmp_path):
    for directory in ("gs://bucket/written", tmp_path / "written"):
        with remote_sync.output_directory(directory) as staging:
            (staging / "a").write_text("b")
    assert server.objects["written/a"] == b"b" and (tmp_path / "written/a").read_text() == "b"


def test_checkpoints(server):
    tx = optax.adam(0.1)
    params = {"encoder": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    state = train_step.TrainState(jnp.asarray(4, jnp.int32), params, tx.init(params))
    with checkpointing.Checkpoints("gs://bucket/saved", keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state, {"config": {}})
    assert "saved/checkpoints/4/commit_success.txt" in server.objects
    del server.objects["saved/checkpoints/4/commit_success.txt"]
    with pytest.raises(UserError, match="gs://bucket/saved"):
        orbax_checkpoint.steps("gs://bucket/saved")  # killed during the save
    server.objects["saved/checkpoints/4/commit_success.txt"] = b""
    loaded, metadata = orbax_checkpoint.load_params("gs://bucket/saved")
    np.testing.assert_array_equal(loaded["encoder"]["kernel"], params["encoder"]["kernel"])
    assert metadata["step"] == 4 and orbax_checkpoint.describe("gs://bucket/saved")[0][1] == (2, 3)


@pytest.mark.slow
def test_a_bad_step_is_dumped_to_gcs(server, tmp_path, monkeypatch):
    """With a remote store and its example ids."""
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
    step = bad_step_replay.replay(tmp_path / "step")
    assert step.bad_examples() == step.ids and len(set(step.ids)) == 4
    stored = {
        x["id"]: image_ops.decode_image(x["image"]) for x in tfds_dataset.Split(store, "view000")
    }
    with np.load(tmp_path / "step/batch_0000.npz") as batch:
        for id_, image in zip(step.ids, batch["image"], strict=True):
            np.testing.assert_array_equal(stored[id_.removeprefix("view000/")], image)


@pytest.mark.slow
def test_a_run(server, tmp_path, monkeypatch):
    """Killed after its first checkpoint and resumed: the losses of a run on a local disk."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # set for tests
    images = data.image_dataset(tmp_path, per_class=10)
    store = data.token_store(tmp_path, images, data.random_teacher(tmp_path / "teacher"))
    flags = {
        "data.path": store, "total": "40 steps", "batch_size": 8, "log_every": 1,
        "checkpoint.every": "4 steps", "evals.knn": "", "evals.heldout": "",
    } | {f"model.{name}": value for name, value in data.TINY.items()}  # fmt: skip
    argv = [*TRAIN, *(f"--config.{name}={value}" for name, value in flags.items())]

    def start(workdir):
        return processes.start(
            [*argv, f"--workdir={workdir}"], **environment(server),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )  # fmt: skip

    killed = start("gs://bucket/run")
    until = time.monotonic() + 200
    while "run/checkpoints/4/commit_success.txt" not in server.objects:
        assert killed.poll() is None and time.monotonic() < until, killed.communicate()[0][-3000:]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for workdir in ("gs://bucket/run", tmp_path / "local"):
        (output,) = processes.outputs_of([process := start(workdir)], timeout=300)
        assert process.returncode == 0, output[-3000:]
        resumed = workdir == "gs://bucket/run"
        assert ("resuming from step" in output) == resumed
        pattern = rf"first step \d+ s after .*: (\d+) of \d+ programs from {workdir}/compile_cache"
        assert (int(re.search(pattern, output)[1]) > 0) == resumed
    assert not (tmp_path / "gs:").exists() and not os.path.exists("gs:")
    runs = ("gs://bucket/run", tmp_path / "local")
    curves = [metrics_log.read(run).curves["loss"].as_dict() for run in runs]
    assert curves[0] == curves[1] and len(curves[0]) == 40

    def command(*argv):
        process = subprocess.run(
            [sys.executable, *map(str, argv)], cwd=processes.ROOT, capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(processes.ROOT)},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]

    command(
        "-m", "dgpt_jax.evaluate", "--config=configs/knn_in1k.py", "--checkpoint=gs://bucket/run",
        f"--config.data={images}", "--config.train=train", "--config.test=train",
    )  # fmt: skip
    assert json.loads(server.objects["run/results_step40.json"])["results"]
    command("tools/convert.py", "gs://bucket/run", tmp_path / "timm", "--to=timm")
    assert "step 40" in (tmp_path / "timm/README.md").read_text()
    assert "| loss |" in (tmp_path / "timm/README.md").read_text()
    command("tools/plot.py", "gs://bucket/run", f"--out={tmp_path}/curves.png")
    command("tools/report.py", "gs://bucket/run", f"--out={tmp_path}/run.html")
    command("tools/checkpoint.py", "inspect", "gs://bucket/run")
