"""What the host writes: JSONL, TensorBoard, W&B; averages of an interval."""

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

from dgpt_jax import metrics, sharding
from dgpt_jax.config import Mesh
from dgpt_jax.schema import UserError


def events(workdir):
    """(step, value) of what TensorBoard would show."""
    for path in (workdir / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            data = data[16 + length :]


def test_what_reaches_jsonl_and_tensorboard(tmp_path, capsys):
    writer = metrics.Writer(tmp_path)
    writer.scalars(3, {"loss": 1.5, "next": math.nan})
    writer.config({"batch_size": 8})
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[1, 2] = 10, 200, 30
    writer.pictures(5, lambda: {"predictions": picture})
    writer.pictures(6, lambda: 1 / 0)
    writer.close()
    assert "no pictures of step 6: ZeroDivisionError" in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "loss": 1.5, "next": "nan"}]
    found = {(step, value.tag): value for step, value in events(tmp_path)}
    assert found[3, "loss"].simple_value == 1.5 and math.isnan(found[3, "next"].simple_value)
    (text,) = (value for _, value in events(tmp_path) if value.tag.startswith("config"))
    assert b'"batch_size": 8' in text.tensor.string_val[0]
    shown = Image.open(io.BytesIO(found[5, "predictions"].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(shown), picture)
    metrics.Writer(tmp_path).close()  # a resumed run appends
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


def test_pictures_do_not_pile_up(tmp_path, capsys):
    """Where drawing does not keep up with evaluations, the newest are left out."""
    writer, go_on = metrics.Writer(tmp_path), threading.Event()

    def draw():
        assert go_on.wait(60)
        return {"predictions": np.zeros((4, 6, 3), np.uint8)}

    for step in range(20):
        writer.pictures(step, draw)
    go_on.set()
    writer.close()
    drawn = [step for step, value in events(tmp_path) if value.tag == "predictions"]
    assert drawn == list(range(metrics.MOST_WAITING))
    assert capsys.readouterr().err.count("no pictures of step") == 20 - metrics.MOST_WAITING


class FakeWandb(types.ModuleType):
    """What of wandb is called, written down."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.told, self.fails = [], fails

    def Image(self, picture):
        return picture.shape

    def init(self, **how):
        if self.fails:
            raise RuntimeError(self.fails)
        self.told.append(how)
        return self

    config = SimpleNamespace(update=lambda *_, **__: None)

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.told.append(values)

    def finish(self):
        self.told.append("finished")


def test_wandb_where_the_config_asks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    ids = set()
    for _ in range(2):  # a command that goes on, goes on with its run
        writer = metrics.Writer(tmp_path, "vit")
        writer.config({"batch_size": 8})
        writer.scalars(3, {"loss": 1.5})
        writer.pictures(4, lambda: {"crops": np.zeros((4, 6, 3), np.uint8)})
        writer.close()
        begun, loss, picture, end = fake.told
        assert begun["project"] == "vit" and begun["resume"] == "allow"
        assert begun["id"] == (tmp_path / "wandb_id").read_text() and len(begun["id"]) == 16
        assert loss == {"step": 3, "loss": 1.5} and picture == {"step": 4, "crops": (4, 6, 3)}
        assert end == "finished"
        ids.add(begun["id"])
        fake.told.clear()
    assert len(ids) == 1
    metrics.Writer(tmp_path).close()
    assert not fake.told  # off, unless a project is named
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails="no API key\nconfigured"))
    with pytest.raises(UserError, match=r"config.wandb=vit: no API key configured \(WANDB_MODE"):
        metrics.Writer(tmp_path, "vit")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb"):
        metrics.Writer(tmp_path, "vit")


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    line = f"{tmp_path}/metrics.jsonl cannot be written: No space left on device: mend that, then"
    with pytest.raises(UserError, match=line), contextlib.closing(metrics.Writer(tmp_path)) as full:
        full.scalars(1, {"loss": 1.0})


def test_best_and_last_of_evaluations(tmp_path):
    """Of the run as it went on: a line that was cut and a step logged anew do not count."""
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


def test_an_interval_is_taken_when_the_next_one_ends():
    mesh = sharding.make_mesh(Mesh())
    interval = metrics.Interval(("loss",), mesh)
    for loss in (1.0, 3.0):
        seen = type(interval.running).single_from_model_output(loss=jnp.float32(loss))
        interval.running = interval.running.merge(seen)
    assert interval.take() is None
    interval.end(2, {"rate": 0.5}, {"skipped": jnp.int32(1)})
    seen = type(interval.running).single_from_model_output(loss=jnp.float32(7.0))
    interval.running = interval.running.merge(seen)
    assert interval.take() == (2, {"rate": 0.5, "loss": 2.0, "skipped": 1.0})
    assert interval.take() is None
    interval.end(3, {}, {})
    assert interval.take() == (3, {"loss": 7.0})
