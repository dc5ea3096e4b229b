"""Outputs of the writer: JSONL, TensorBoard, W&B; averages of an accumulator."""

import contextlib
import io
import json
import math
import struct
import sys
import threading
import types
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dgpt_jax.config import MeshConfig
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics


def events(workdir):
    """(step, value) of all summaries in TensorBoard's files."""
    for path in (workdir / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            data = data[16 + length :]


def test_jsonl_and_tensorboard_files(tmp_path, capsys):
    writer = metrics.Writer(tmp_path)
    writer.scalars(3, {"loss": 1.5, "next": math.nan})
    writer.config({"batch_size": 8})
    image = np.zeros((4, 6, 3), np.uint8)
    image[1, 2] = 10, 200, 30
    writer.images(5, lambda: {"predictions": image})
    writer.images(6, lambda: 1 / 0)
    writer.close()
    assert "step 6: ZeroDivisionError" in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "loss": 1.5, "next": "nan"}]
    values = {(step, value.tag): value for step, value in events(tmp_path)}
    assert values[3, "loss"].simple_value == 1.5 and math.isnan(values[3, "next"].simple_value)
    (text,) = (value for _, value in events(tmp_path) if value.tag.startswith("config"))
    assert b'"batch_size": 8' in text.tensor.string_val[0]
    decoded = Image.open(io.BytesIO(values[5, "predictions"].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), image)
    metrics.Writer(tmp_path).close()  # a resumed run appends
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


def test_pending_images_are_limited(tmp_path, capsys):
    """If drawing is slower than evaluations, the newest steps are skipped."""
    writer, unblock = metrics.Writer(tmp_path), threading.Event()

    def draw():
        assert unblock.wait(60)
        return {"predictions": np.zeros((4, 6, 3), np.uint8)}

    for step in range(20):
        writer.images(step, draw)
    unblock.set()
    writer.close()
    drawn = [step for step, value in events(tmp_path) if value.tag == "predictions"]
    assert drawn == list(range(metrics.MAX_PENDING))
    assert capsys.readouterr().err.count("no images of step") == 20 - metrics.MAX_PENDING


class FakeWandb(types.ModuleType):
    """Records calls of wandb."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.calls, self.fails = [], fails

    def Image(self, image):
        return image.shape

    def init(self, **arguments):
        if self.fails:
            raise RuntimeError(self.fails)
        self.calls.append(arguments)
        return self

    config = SimpleNamespace(update=lambda *_, **__: None)

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.calls.append(values)

    def finish(self):
        self.calls.append("finished")


def test_wandb_if_a_project_is_set(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    ids = set()
    for _ in range(2):  # a resumed command resumes its W&B run
        writer = metrics.Writer(tmp_path, "vit")
        writer.config({"batch_size": 8})
        writer.scalars(3, {"loss": 1.5})
        writer.images(4, lambda: {"crops": np.zeros((4, 6, 3), np.uint8)})
        writer.close()
        init, loss, image, finish = fake.calls
        assert init["project"] == "vit" and init["resume"] == "allow"
        assert init["id"] == (tmp_path / "wandb_id").read_text() and len(init["id"]) == 16
        assert loss == {"step": 3, "loss": 1.5} and image == {"step": 4, "crops": (4, 6, 3)}
        assert finish == "finished"
        ids.add(init["id"])
        fake.calls.clear()
    assert len(ids) == 1
    metrics.Writer(tmp_path).close()
    assert not fake.calls
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails="no API key\nconfigured"))
    with pytest.raises(UserError, match=r"config.wandb=vit: no API key configured \(WANDB_MODE"):
        metrics.Writer(tmp_path, "vit")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"dgpt_jax\[wandb\]"):
        metrics.Writer(tmp_path, "vit")


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    reason = f"{tmp_path}/metrics.jsonl .*: No space left on device"
    writer = contextlib.closing(metrics.Writer(tmp_path))
    with pytest.raises(UserError, match=reason), writer as full:
        full.scalars(1, {"loss": 1.0})


def test_best_and_last_of_evaluations(tmp_path):
    """Without a truncated line, and without steps that were logged again after a restart."""
    lines = [
        {"step": 10, "loss": 3.0}, {"step": 10, "val/top1": 0.5, "heldout/next": 1.0},
        {"step": 20, "val/top1": 0.9, "heldout/next": 0.9},  # a restart from step 10 follows
        {"step": 20, "val/top1": 0.8, "heldout/next": 1.2}, {"step": 30, "val/top1": 0.7},
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 40, "val/'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert metrics.best_and_last(tmp_path, "val/top1") == [
        "val/top1: best 0.8000 at step 20, last 0.7000 at step 30",
        "heldout/next: best 1.0000 at step 10, last 1.2000 at step 20",
    ]
    assert metrics.best_and_last(tmp_path, "") == []


def test_an_interval_is_fetched_after_it_is_closed():
    mesh = sharding.make_mesh(MeshConfig())
    accumulator = metrics.MetricAccumulator(("loss",), mesh)
    for loss in (1.0, 3.0):
        update = type(accumulator.running).single_from_model_output(loss=jnp.float32(loss))
        accumulator.running = accumulator.running.merge(update)
    assert accumulator.fetch() is None
    accumulator.close(2, {"rate": 0.5}, {"skipped": jnp.int32(1)})
    update = type(accumulator.running).single_from_model_output(loss=jnp.float32(7.0))
    accumulator.running = accumulator.running.merge(update)
    assert accumulator.fetch() == (2, {"rate": 0.5, "loss": 2.0, "skipped": 1.0})
    assert accumulator.fetch() is None
    accumulator.close(3, {}, {})
    assert accumulator.fetch() == (3, {"loss": 7.0})
