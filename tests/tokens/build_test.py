"""Building token stores: many processes, interruptions, damage, moves, full disks."""

import dataclasses
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import portpicker
import pytest
from safetensors.numpy import load_file, save_file

from dgpt_jax.config import DataConfig, roots
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset as pipeline
from dgpt_jax.data import token_store
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import verify
from dgpt_jax.tokens.teacher import Teacher
from tests.support import data, processes

VIEWS, EXAMPLES = 20, 400
SETTINGS = dict(views=VIEWS, shard_size=8, batch_size=3)
SHARDS = 60


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(root, command that builds `root/tokens` without --out, that store)."""
    root = tmp_path_factory.mktemp("build")
    dataset = data.image_dataset(root, per_class=10)
    teacher = data.random_teacher(root / "teacher")
    settings = SETTINGS | dict(source=dataset, image_size=16, image_encoding="png", threads=2)
    command = ["tools/build_tokens.py", "--config=configs/quickstart_tokens.py"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    command += ["--config.crop_scale=(0.2, 1.0)", "--config.flip=True"]
    command.append(f"--config.teacher.weights={teacher}")
    return root, command, data.token_store(root, dataset, teacher, **SETTINGS)


def contents(store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("[!.]*array_record*")}


def run(command, out, **kwargs) -> str:
    process = processes.start([*command, f"--out={out}"], **kwargs)
    (output,) = processes.outputs_of([process], timeout=120)
    assert process.returncode == 0, output[-2000:]
    return output


@pytest.mark.slow
def test_two_processes_of_four_devices_build_the_same_store(built, tmp_path):
    _, command, store = built
    port = portpicker.pick_unused_port()
    command = [
        *command,
        f"--out={tmp_path / 'tokens'}",
        f"--config.hosts.coordinator=localhost:{port}",
    ]
    command.append("--config.hosts.num_processes=2")
    started = [
        processes.start([*command, f"--config.hosts.process_id={i}"], devices=4) for i in range(2)
    ]
    outputs = processes.outputs_of(started, timeout=180)
    assert [process.returncode for process in started] == [0, 0], outputs
    assert contents(tmp_path / "tokens") == contents(store)
    assert len(contents(store)) == SHARDS
    assert "examples 200/200" in outputs[0]  # half of them: the other process built the rest
    expected, actual = (tfds_dataset.open_builder(s).info for s in (store, tmp_path / "tokens"))
    assert expected.splits["view001"].shard_lengths == actual.splits["view001"].shard_lengths


@pytest.mark.slow
def test_a_killed_build_resumes(built, tmp_path):
    _, command, store = built
    out = tmp_path / "tokens"
    process = processes.start([*command, f"--out={out}"])
    while len(contents(out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that it is killed during the build
    shards = contents(out)
    process.kill()
    process.wait()
    assert 3 <= len(shards) < SHARDS and not (out / "dataset_info.json").exists()
    settings = parse(DataConfig, {"path": str(out)})
    with pytest.raises(UserError, match="unfinished.*python tools/build_tokens.py"):
        pipeline.open_examples(settings, data.tiny_model(), seed=0)
    stamps = {name: (out / name).stat().st_mtime_ns for name in shards}
    output = run(command, out)
    assert contents(out) == contents(store)
    finished = [name for name, at in stamps.items() if (out / name).stat().st_mtime_ns == at]
    assert len(finished) >= len(stamps) - 2  # each of two writers may lack a receipt
    complete = sum(array_record_shards.shard_infos(out)[name].records for name in finished)
    assert f"complete: {complete} of {EXAMPLES} examples" in output
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    again = run(command, out)
    assert f"complete: {EXAMPLES} of {EXAMPLES} examples" in again


def test_sigterm_keeps_complete_shards(built, tmp_path):
    _, command, _ = built
    out = tmp_path / "tokens"
    process = processes.start([*command, "--config.views=4000", f"--out={out}"])
    while not contents(out) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75 and contents(out)
    for name, receipt in array_record_shards.shard_infos(
        out
    ).items():  # none was closed before its end
        assert receipt.records == (4 if "-00002-of-" in name else 8)
    assert not list(out.glob(".*.partial"))


def test_views_are_added_to_a_renamed_store(built, tmp_path):
    _, command, store = built
    out = shutil.copytree(store, tmp_path / "moved")
    shards = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    run([*command, f"--config.views={VIEWS + 1}"], out)
    assert len(tfds_dataset.open_builder(out).info.splits) == VIEWS + 1
    assert len(shards) == SHARDS
    assert all((out / name).stat().st_mtime_ns == at for name, at in shards.items())
    assert len(list(tfds_dataset.Split(out, f"view{VIEWS:03}"))) == 20


def test_a_source_imported_again_is_rejected(tmp_path):
    """Other images, as many, at the same path."""
    teacher = data.random_teacher(tmp_path / "teacher")
    dataset = data.image_dataset(tmp_path, per_class=8)
    store = data.token_store(tmp_path, dataset, teacher, views=1)
    shutil.rmtree(tmp_path / "folder")
    shutil.rmtree(dataset)
    data.image_dataset(tmp_path, per_class=8, seed=1)
    with pytest.raises(UserError, match="source .*digest.*--out"):
        data.token_store(tmp_path, dataset, teacher, views=2)
    settings = parse(roots.TeacherConfig, {"weights": str(teacher)})
    with pytest.raises(UserError, match="digest"):
        next(verify.verify(store, settings, source=str(dataset)))
    info = token_store.StoreInfo.load(store)  # as in earlier versions
    source = {name: value for name, value in info.source.items() if name != "digest"}
    dataclasses.replace(info, source=source).save(store)
    data.token_store(tmp_path, dataset, teacher, views=2)


def test_a_rerun_with_fewer_views_keeps_all(built):
    root, _, store = built
    data.token_store(root, root / "images", root / "teacher", **SETTINGS | {"views": 1})
    assert len(tfds_dataset.open_builder(store).info.splits) == VIEWS


def test_too_little_disk_space(built, tmp_path, monkeypatch):
    root, _, _ = built
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(UserError, match=r"tokens needs .*config.views"):
        data.token_store(tmp_path, root / "images", root / "teacher")
    assert not contents(tmp_path / "tokens")


def test_non_finite_tokens(built, tmp_path):
    root, _, _ = built
    teacher = shutil.copytree(root / "teacher", tmp_path / "teacher")
    state = load_file(teacher / "open_clip_model.safetensors")
    state["visual.proj"] = np.full_like(state["visual.proj"], np.inf)
    save_file(state, teacher / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="config.teacher.weights"):
        data.token_store(tmp_path, root / "images", teacher)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(built, tmp_path):
    _, command, store = built
    out = tmp_path / "tokens"
    port = portpicker.pick_unused_port()
    command = [*command, "--config.views=4000", f"--out={out}"]
    command += [f"--config.hosts.coordinator=localhost:{port}", "--config.hosts.num_processes=2"]
    started = [processes.start([*command, f"--config.hosts.process_id={i}"]) for i in range(2)]
    while len(contents(out)) < 4 and started[0].poll() is None:
        time.sleep(0.05)
    started[1].kill()
    started[0].communicate(timeout=120)
    assert started[0].returncode != 0
    built = contents(out)
    expected = contents(store)
    common = built.keys() & expected.keys()
    assert common and all(built[name] == expected[name] for name in common)


def test_a_rerun_uses_the_codec_of_the_store(built, tmp_path):
    root, _, store = built
    out = shutil.copytree(store, tmp_path / "tokens")
    info = token_store.StoreInfo.load(out)
    teacher = dataclasses.replace(info.teacher, channel_scale=(1.0,) * info.teacher.width)
    changed = dataclasses.replace(info, teacher=teacher)
    changed.save(out)
    data.token_store(tmp_path, root / "images", root / "teacher", **SETTINGS | {"views": VIEWS + 1})
    assert token_store.StoreInfo.load(out) == changed
    assert contents(out).items() > contents(store).items()


def sharded_over_devices():
    with tempfile.TemporaryDirectory() as scratch:
        settings = roots.TeacherConfig(weights=str(data.random_teacher(Path(scratch))))
        images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
        unsharded = Teacher(settings, 8)
        sharded = Teacher(settings, 2, tensor=2)
        assert (unsharded.batch_size, sharded.batch_size) == (32, 4)
        kernel = sharded.params["blocks"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size * 2 == kernel.size
        np.testing.assert_allclose(sharded(images), unsharded(images), atol=1e-4)


def test_a_teacher_sharded_over_devices():
    processes.on_devices(4, sharded_over_devices)
