"""Interrupted embeddings continue to the same bytes; other settings, and damage, are refused."""

import errno
import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from dgpt_jax.errors import UserError
from dgpt_jax.evals.embedding import feature_batches, feature_store, journal, run
from dgpt_jax.weights import api
from tests.support import embeddings, processes
from tests.support.embeddings import FakeEncoder, digests


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch):
    monkeypatch.setattr(run, "Encoder", FakeEncoder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    embeddings.real_images(root / "images")
    embeddings.encoder_file(root / "encoder.safetensors")
    return root


@pytest.fixture(scope="module")
def encoder(root):
    return api.load_encoder(root / "encoder.safetensors")


def embed(root, encoder, out, **options):
    options = dict(batch_size=4, shard_size=8, threads=2, say=lambda _: None) | options
    return run.embed(options.pop("src", root / "images"), encoder, out, **options)


def failing(function, calls: int, *, after: bool):
    """A function whose call number `calls` raises, before or after its work."""
    count = 0

    def wrapped(*args):
        nonlocal count
        count += 1
        if count == calls and not after:
            raise Killed
        result = function(*args)
        if count == calls:
            raise Killed
        return result

    return wrapped


POINTS = {  # (module, function, call, after its work)
    "in the first shard": (feature_batches, "_finish", 2, False),
    "in the third shard": (feature_batches, "_finish", 6, False),
    "before a shard is recorded": (journal, "append", 2, False),
    "after a shard is recorded": (journal, "append", 2, True),
    "before the metadata are complete": (feature_store.FeatureInfo, "save", 2, False),
    "before the progress is removed": (journal, "remove", 1, False),
}


@pytest.mark.parametrize("to", feature_store.FORMATS)
def test_interrupted_anywhere(root, encoder, tmp_path, monkeypatch, to):
    """The same command again gives the same bytes."""
    out = tmp_path / "out"
    embed(root, encoder, out, to=to)
    expected = digests(out)
    for point, (module, name, calls, after) in POINTS.items():
        shutil.rmtree(out)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, failing(getattr(module, name), calls, after=after))
            embed(root, encoder, out, to=to)
        (out / ".left.1.partial").write_text("of a writer that was killed")
        with (out / journal.FILE).open("a") as file:
            file.write('{"split": "tr')  # a line that was being written
        embed(root, encoder, out, to=to)
        if point == "before the progress is removed":  # it was complete
            (out / ".left.1.partial").unlink(missing_ok=True)
            journal.remove(out)
        assert digests(out) == expected, point


@pytest.mark.slow
@pytest.mark.parametrize("to", feature_store.FORMATS)
def test_killed_processes(root, tmp_path, to):
    """SIGKILL at several moments."""
    words = [
        "tools/embed.py", root / "images", f"--checkpoint={root / 'encoder.safetensors'}",
        f"--out={tmp_path / 'out'}", f"--to={to}", "--batch_size=2", "--shard_size=2",
        "--tokens=all",
    ]  # fmt: skip
    process = processes.start(words)
    (output,) = processes.outputs_of([process])
    assert process.returncode == 0, output
    expected, lines = digests(tmp_path / "out"), tmp_path / "out" / journal.FILE
    shutil.rmtree(tmp_path / "out")
    for shards in (1, 5, 11):
        process = processes.start(words)
        while process.poll() is None and not (
            lines.exists() and lines.read_text().count("\n") >= shards
        ):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = processes.start(words)
    (output,) = processes.outputs_of([process])
    assert process.returncode == 0 and "resuming" in output, output
    assert digests(tmp_path / "out") == expected


CHANGES = {
    "to": ({"to": "store"}, "--to"),
    "tokens": ({"tokens": "mean"}, "--tokens"),
    "dtype": ({"dtype": "float16"}, "--dtype"),
    "batch_size": ({"batch_size": 2}, "--batch_size"),
    "shard_size": ({"shard_size": 4}, "--shard_size"),
    "source": ({"src": "less"}, "source"),
    "labels": ({"labels": "labels.txt"}, "source"),
    "encoder": ({"encoder": "other.safetensors"}, "--checkpoint"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_another_command_is_refused(root, encoder, tmp_path, monkeypatch, change, finished):
    changes, flag = CHANGES[change]
    changes, out = dict(changes), tmp_path / "out"
    if finished:
        embed(root, encoder, out)
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            append = failing(journal.append, 2, after=True)
            patch.setattr(journal, "append", append)
            embed(root, encoder, out)
    if "src" in changes:
        changes["src"] = embeddings.real_images(tmp_path / "less", tiles=11)
    if "labels" in changes:
        names = sorted((root / "images").rglob("*.png"))
        lines = (f"{p.relative_to(root / 'images')}\t{i % 2}\n" for i, p in enumerate(names))
        changes["labels"] = tmp_path / "labels.txt"
        changes["labels"].write_text("".join(lines))
    if path := changes.pop("encoder", None):
        encoder = api.load_encoder(embeddings.encoder_file(tmp_path / path, depth=3))
    before = digests(out)
    with pytest.raises(UserError) as caught:
        embed(root, encoder, out, **changes)
    assert f"other {flag}" in str(caught.value) and "\n" not in str(caught.value)
    assert digests(out) == before


def test_the_same_weights_and_images_elsewhere(root, encoder, tmp_path):
    embed(root, encoder, tmp_path / "out")
    before = digests(tmp_path / "out")
    shutil.copytree(root / "images", tmp_path / "moved")
    shutil.copy(root / "encoder.safetensors", tmp_path / "moved.safetensors")
    lines = []
    encoder = api.load_encoder(tmp_path / "moved.safetensors")
    embed(root, encoder, tmp_path / "out", src=tmp_path / "moved", say=lines.append)
    assert digests(tmp_path / "out") == before and "finished" in lines[-1]


def test_a_directory_with_other_files(root, encoder, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError) as caught:
        embed(root, encoder, tmp_path)
    assert str(tmp_path) in str(caught.value) and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("to", feature_store.FORMATS)
def test_a_changed_file_of_a_finished_directory(root, encoder, tmp_path, to):
    info = embed(root, encoder, tmp_path / "out", to=to)
    for name in info.files:
        content = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(content[:-1])
        with pytest.raises(UserError) as caught:
            embed(root, encoder, tmp_path / "out", to=to)
        assert name in str(caught.value)
        (tmp_path / "out" / name).write_bytes(content)
    embed(root, encoder, tmp_path / "out", to=to)


@pytest.mark.parametrize("to", feature_store.FORMATS)
def test_a_changed_file_of_an_unfinished_directory(root, encoder, tmp_path, monkeypatch, to):
    """Shards are written again; an array that is too short is refused."""
    out = tmp_path / "out"
    embed(root, encoder, out, to=to)
    expected = digests(out)
    shutil.rmtree(out)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(journal, "append", failing(journal.append, 2, after=True))
        embed(root, encoder, out, to=to)
    path = next(p for p in sorted(out.iterdir()) if "train" in p.name and p.name[0] != ".")
    path.write_bytes(path.read_bytes()[:10])
    if to in ("npy", "safetensors"):
        with pytest.raises(UserError) as caught:
            embed(root, encoder, out, to=to)
        assert str(path.parent) in str(caught.value)
        return
    embed(root, encoder, out, to=to)
    assert digests(out) == expected


@pytest.mark.parametrize("to", feature_store.FORMATS)
def test_a_full_disk(root, encoder, tmp_path, monkeypatch, to):
    """One line; the same command continues once there is space."""
    out = tmp_path / "out"
    embed(root, encoder, out, to=to)
    expected = digests(out)
    shutil.rmtree(out)
    fsync, calls = os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(os, "fsync", full)
        embed(root, encoder, out, to=to)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)
    embed(root, encoder, out, to=to)
    assert digests(out) == expected


def test_a_disk_that_is_too_small(root, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(UserError) as caught:
        embed(root, encoder, tmp_path / "out")
    assert "--dtype=float16" in str(caught.value) and not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def store(root, encoder, tmp_path_factory):
    """Of the encoder itself."""
    out = tmp_path_factory.mktemp("store") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Encoder", feature_batches.Encoder)
        embed(root, encoder, out, to="store")
    return out


def test_a_store_gives_the_features_of_the_encoder(root, encoder, store):
    opened = feature_store.open(store)
    files = sorted((root / "images").rglob("*.png"))
    expected = embeddings.expected(encoder, files, "cls")
    split = opened["train"]
    assert opened.splits == ("train",) and len(split) == len(files)
    for i in (29, 0, 13):
        row = split[i]
        assert row["id"] == f"{files[i].parent.name}/{files[i].name}"
        assert opened.info.classes[row["label"]] == files[i].parent.name
        np.testing.assert_allclose(row["features"], expected[i], rtol=0, atol=1e-5)
    assert opened.info.encoder["hash"] and opened.info.preprocessing["crop"] == 16


def change(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


DAMAGE = {
    "no store": lambda out: (out / feature_store.STORE_FILE).unlink(),
    "an unfinished one": lambda out: change(out / feature_store.STORE_FILE, splits={}),
    "a newer format": lambda out: change(out / feature_store.STORE_FILE, format=99),
    "another shape": lambda out: change(out / feature_store.STORE_FILE, shape=[12]),
    "another type": lambda out: change(out / feature_store.STORE_FILE, dtype="float16"),
    "other counts": lambda out: change(
        out / feature_store.STORE_FILE, splits={"train": {"rows": 31, "unreadable": []}}
    ),
    "a key too many": lambda out: change(out / feature_store.STORE_FILE, extra=1),
    "cut off": lambda out: (out / feature_store.STORE_FILE).write_text('{"format": 1'),
    "a missing shard": lambda out: next(out.glob("*array_record*")).unlink(),
    "no metadata of TFDS": lambda out: (out / "features.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused(store, tmp_path, damage):
    shutil.copytree(store, tmp_path / "out")
    DAMAGE[damage](tmp_path / "out")
    with pytest.raises(UserError) as caught:
        feature_store.open(tmp_path / "out")["train"]
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_without_pyarrow(root, encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError) as caught:
        embed(root, encoder, tmp_path / "out", to="parquet")
    assert "dgpt_jax[parquet]" in str(caught.value) and not (tmp_path / "out").exists()
