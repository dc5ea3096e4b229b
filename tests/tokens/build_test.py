"""Building a token store: on many processes, interrupted, damaged, renamed, without space."""

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

from dgpt_jax import build, config, pipeline, records, shards, token_store, verify
from dgpt_jax.config import Data
from dgpt_jax.schema import UserError, parse
from dgpt_jax.teacher import Teacher
from tests import data, processes

VIEWS, EXAMPLES = 20, 400
SETTINGS = dict(views=VIEWS, shard_size=8, batch_size=3)
SHARDS = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(root, words of the command that builds `root/tokens` without --out, that store)."""
    root = tmp_path_factory.mktemp("build")
    dataset = data.image_dataset(root, per_class=10)
    teacher = data.random_teacher(root / "teacher")
    settings = SETTINGS | dict(source=dataset, picture_size=16, picture="png", threads=2)
    words = ["tools/build_tokens.py", "--config=configs/quickstart_tokens.py"]
    words += [f"--config.{name}={value}" for name, value in settings.items()]
    words += ["--config.crop_scale=(0.2, 1.0)", "--config.flip=True"]
    words.append(f"--config.teacher.weights={teacher}")
    return root, words, data.token_store(root, dataset, teacher, **SETTINGS)


def contents(store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("[!.]*array_record*")}


def run(words, out, **kwargs) -> str:
    process = processes.start([*words, f"--out={out}"], **kwargs)
    (output,) = processes.outputs_of([process], timeout=120)
    assert process.returncode == 0, output[-2000:]
    return output


def test_two_processes_of_four_devices_build_the_same_store(made, tmp_path):
    _, words, store = made
    port = portpicker.pick_unused_port()
    words = [*words, f"--out={tmp_path / 'tokens'}", f"--config.hosts.coordinator=localhost:{port}"]
    words.append("--config.hosts.processes=2")
    started = [
        processes.start([*words, f"--config.hosts.process={i}"], devices=4) for i in range(2)
    ]
    outputs = processes.outputs_of(started, timeout=180)
    assert [process.returncode for process in started] == [0, 0], outputs
    assert contents(tmp_path / "tokens") == contents(store)
    assert len(contents(store)) == SHARDS
    assert "200/200 examples" in outputs[0]  # half of them: the other process built the rest
    ours, theirs = (records.open_builder(s).info for s in (store, tmp_path / "tokens"))
    assert ours.splits["view001"].shard_lengths == theirs.splits["view001"].shard_lengths


def test_killed_in_the_middle_and_run_again(made, tmp_path):
    _, words, store = made
    out = tmp_path / "tokens"
    process = processes.start([*words, f"--out={out}"])
    while len(contents(out)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that it is really killed in the middle
    before = contents(out)
    process.kill()
    process.wait()
    assert 3 <= len(before) < SHARDS and not (out / "dataset_info.json").exists()
    settings = parse(Data, {"path": str(out)})
    with pytest.raises(UserError, match=r"unfinished.*Finish it with: python tools/build_tokens"):
        pipeline.open_examples(settings, data.tiny_model(), seed=0)
    stamps = {name: (out / name).stat().st_mtime_ns for name in before}
    output = run(words, out)
    assert contents(out) == contents(store)
    finished = [name for name, at in stamps.items() if (out / name).stat().st_mtime_ns == at]
    assert len(finished) >= len(stamps) - 2  # each of two writers may lack a receipt
    kept = sum(shards.receipts(out)[name].records for name in finished)
    assert f"{kept} of {EXAMPLES} examples are there" in output
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    again = run(words, out)
    assert f"{EXAMPLES} of {EXAMPLES} examples are there and whole" in again


def test_sigterm_keeps_what_is_complete(made, tmp_path):
    _, words, _ = made
    out = tmp_path / "tokens"
    process = processes.start([*words, "--config.views=4000", f"--out={out}"])
    while not contents(out) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75 and contents(out)
    for name, receipt in shards.receipts(out).items():  # none was closed before its end
        assert receipt.records == (4 if "-00002-of-" in name else 8)
    assert not list(out.glob(".*.partial"))


def test_views_are_added_to_a_renamed_store(made, tmp_path):
    _, words, store = made
    out = shutil.copytree(store, tmp_path / "moved")
    before = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    run([*words, f"--config.views={VIEWS + 1}"], out)
    assert len(records.open_builder(out).info.splits) == VIEWS + 1
    assert len(before) == SHARDS
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())
    assert len(list(records.Split(out, f"view{VIEWS:03}"))) == 20


def test_a_source_imported_anew_is_not_mixed_in(tmp_path):
    """Other images in the same number at the same path."""
    teacher = data.random_teacher(tmp_path / "teacher")
    dataset = data.image_dataset(tmp_path, per_class=8)
    store = data.token_store(tmp_path, dataset, teacher, views=1)
    shutil.rmtree(tmp_path / "folder")
    shutil.rmtree(dataset)
    data.image_dataset(tmp_path, per_class=8, seed=1)
    with pytest.raises(UserError, match="was built with source .*digest"):
        data.token_store(tmp_path, dataset, teacher, views=2)
    settings = parse(config.Teacher, {"weights": str(teacher)})
    with pytest.raises(UserError, match="was built from other contents"):
        next(verify.verify(store, settings, source=str(dataset)))
    info = token_store.StoreInfo.load(store)  # as earlier versions wrote it
    source = {name: value for name, value in info.source.items() if name != "digest"}
    dataclasses.replace(info, source=source).save(store)
    data.token_store(tmp_path, dataset, teacher, views=2)


def test_fewer_views_than_there_are_keep_them(made):
    root, _, store = made
    data.token_store(root, root / "images", root / "teacher", **SETTINGS | {"views": 1})
    assert len(records.open_builder(store).info.splits) == VIEWS


def test_a_full_disk_is_seen_before_the_work(made, tmp_path, monkeypatch):
    root, _, _ = made
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(UserError, match=r"GB are needed, 0.00 GB are free"):
        data.token_store(tmp_path, root / "images", root / "teacher")
    assert not contents(tmp_path / "tokens")


def test_tokens_that_are_not_finite(made, tmp_path):
    root, _, _ = made
    teacher = shutil.copytree(root / "teacher", tmp_path / "teacher")
    state = load_file(teacher / "open_clip_model.safetensors")
    state["visual.proj"] = np.full_like(state["visual.proj"], np.inf)
    save_file(state, teacher / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="tokens that are not finite"):
        data.token_store(tmp_path, root / "images", teacher)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(made, tmp_path):
    _, words, store = made
    out = tmp_path / "tokens"
    port = portpicker.pick_unused_port()
    words = [*words, "--config.views=4000", f"--out={out}"]
    words += [f"--config.hosts.coordinator=localhost:{port}", "--config.hosts.processes=2"]
    started = [processes.start([*words, f"--config.hosts.process={i}"]) for i in range(2)]
    while len(contents(out)) < 4 and started[0].poll() is None:
        time.sleep(0.05)
    started[1].kill()
    began = time.monotonic()
    started[0].communicate(timeout=120)
    assert started[0].returncode != 0 and time.monotonic() - began < 60
    built = contents(out)
    expected = contents(store)
    common = built.keys() & expected.keys()
    assert common and all(built[name] == expected[name] for name in common)


def test_a_rerun_takes_the_codec_of_the_store(made, tmp_path):
    root, _, store = made
    out = shutil.copytree(store, tmp_path / "tokens")
    info = token_store.StoreInfo.load(out)
    changed = dataclasses.replace(info, channel_scale=(1.0,) * info.width)
    changed.save(out)
    data.token_store(tmp_path, root / "images", root / "teacher", **SETTINGS | {"views": VIEWS + 1})
    assert token_store.StoreInfo.load(out) == changed
    assert contents(out).items() > contents(store).items()


def split_over_devices():
    with tempfile.TemporaryDirectory() as scratch:
        settings = config.Teacher(weights=str(data.random_teacher(Path(scratch))))
        pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
        whole = Teacher(settings, 8)
        parts = Teacher(settings, 2, tensor=2)
        assert (whole.batch_size, parts.batch_size) == (32, 4)
        kernel = parts.params["blocks"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size * 2 == kernel.size
        np.testing.assert_allclose(parts(pictures), whole(pictures), atol=1e-4)


def test_a_teacher_split_over_devices():
    processes.on_devices(4, split_over_devices)
