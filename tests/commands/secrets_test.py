"""No code in files is executed, no name in an archive is used as a path, no secret is written."""

import argparse
import ast
import gzip
import io
import itertools
import os
import pickle
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest

from dgpt_jax.data import teacher_info
from dgpt_jax.data.ingest import discovery, importer, tar_index
from dgpt_jax.errors import UserError
from dgpt_jax.storage import byte_ranges, tfds_dataset
from dgpt_jax.weights import files
from tests.data.bad_records_test import jpeg, write_images
from tests.support import processes, stores
from tests.support.paths import ROOT

SECRET = "hunter2-not-for-any-log-4f1c"


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_touch(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "made"))).close()
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("location", ["model", "args", "inside the namespace", "root"])
def test_code_in_weights_is_an_error(tmp_path, location):
    torch = pytest.importorskip("torch")
    bait, weights = Touch(tmp_path / "made"), {"x": torch.ones(2)}
    content = {
        "model": {"model": bait},
        "args": {"model": weights, "args": bait},
        "inside the namespace": {"model": weights, "args": argparse.Namespace(x=bait)},
        "root": bait,
    }[location]
    for number, legacy in enumerate((True, False)):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=str(path)):
            files.read_state(path)
    assert not (tmp_path / "made").exists()


def test_namespace_is_the_only_class_allowed_in_weights(tmp_path):
    torch = pytest.importorskip("torch")
    before = set(torch.serialization.get_safe_globals())
    for value, allowed in (
        (argparse.Namespace(lr=1.0, path="x"), True),
        (types.SimpleNamespace(lr=1.0), False),
        (Path("x"), False),
        (np.ones(2), False),
    ):
        torch.save({"model": {"x": torch.ones(2)}, "args": value}, tmp_path / "a.pth")
        if allowed:
            assert files.read_state(tmp_path / "a.pth").keys() == {"x"}
        else:
            with pytest.raises(UserError, match="a.pth"):
                files.read_state(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_code_in_a_pca_basis_is_an_error(tmp_path):
    store = tmp_path / "tokens"
    store.mkdir()
    info = stores.store_info(width=4)
    info.teacher.weights["width"] = 8
    np.save(store / teacher_info.BASIS_FILE, np.array([Touch(tmp_path / "made")], object))
    with pytest.raises(UserError, match="basis.npy.*Object arrays"):
        info.teacher.load_codec(store)
    (store / teacher_info.BASIS_FILE).write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    with pytest.raises(UserError, match=r"basis.npy"):
        info.teacher.load_codec(store)
    assert not (tmp_path / "made").exists()
    np.save(store / teacher_info.BASIS_FILE, np.ones((8, 3), np.float32))
    with pytest.raises(UserError, match=r"basis.npy.*\(8, 3\).*metadata of the store"):
        info.teacher.load_codec(store)
    np.save(store / teacher_info.BASIS_FILE, np.ones((8, 4), np.float32))
    assert info.teacher.load_codec(store).basis.shape == (8, 4)


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


OWN = {"extract", "feature_batches.extract"}  # no archive's methods


def test_no_call_unpickles():
    """The flags are explicit, since PyTorch's default has changed between versions."""
    required = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    counts = dict.fromkeys(required, 0)
    for path in [*ROOT.glob("dgpt_jax/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        for name, keywords in calls(path):
            assert name not in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec"), path
            assert not name.endswith(("extract", "extractall")) or name in OWN, path
            if name in required:
                key, value = required[name]
                assert keywords.get(key) == value, path
                counts[name] += 1
    assert min(counts.values()) == 1


def hostile_tar(path, names):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for seed, name in enumerate(names):
            member, content = tarfile.TarInfo(name), jpeg(16, 16, seed)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)


def test_tar_names_are_not_used_as_paths(tmp_path):
    """Members are read from the archive, and their ids stay below it."""
    outside = tmp_path / "outside.jpg"
    names = {
        "../../x.jpg": "x.jpg",
        "/etc/y.jpg": "etc/y.jpg",
        f"../{outside.name}": outside.name,
        str(outside.with_name("absolute.jpg")): f"{tmp_path}/absolute.jpg"[1:],
        "a/../../b/./z.jpg": "b/z.jpg",
        "//c//d.jpg": "c/d.jpg",
        "e/" + "f" * 120 + "/../../../g.jpg": "g.jpg",  # in a header of its own
    }
    work = tmp_path / "deep/work"
    work.mkdir(parents=True)
    hostile_tar(work / "images.tar", names)
    before = {path for path in tmp_path.rglob("*")}
    report = importer.import_images(
        work / "images.tar", tmp_path / "out", split="train", say=lambda _: None
    )
    created = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "out") for path in created)
    assert not Path("/etc/y.jpg").exists()
    split = tfds_dataset.Split(tmp_path / "out", "train")
    assert sorted(example["id"] for example in split) == sorted(names.values())
    for example in split:
        assert not example["id"].startswith(("/", "..")) and "/../" not in example["id"]
    assert [line.partition(":")[0] for line in report.broken] == ["link1.jpg"]
    assert any(f"link2.jpg in {work}/images.tar" in line for line in report.skipped)


def test_equal_names_are_an_error(tmp_path):
    hostile_tar(tmp_path / "images.tar", ["a/x.jpg", "../a/x.jpg"])
    with pytest.raises(UserError, match="twice.* a/x.jpg"):
        discovery.discover(tmp_path / "images.tar")


@pytest.mark.parametrize("size", [b"-1024", b"12x", b"9" * 30])
def test_invalid_sizes_in_a_tar(tmp_path, size):
    """They would point back to an earlier member, forever, or past the end."""
    note = b"%d size=%s\n" % (len(size) + 9, size)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind, content in (
            ("a.jpg", tarfile.REGTYPE, b"x"),
            ("note", tarfile.XHDTYPE, note),
            ("b.jpg", tarfile.REGTYPE, b"x"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            archive.addfile(member, io.BytesIO(content))
    with byte_ranges.RangeReader(str(tmp_path / "x.tar")) as file:
        members = itertools.islice(tar_index.members(file, "x.tar"), 20)
        with pytest.raises(UserError, match="x.tar .*byte 2048.*b.jpg"):
            list(members)


def all_files(directory: Path):
    """(path, content) of all files, gunzipped."""
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            yield path, gzip.decompress(content) if path.suffix == ".gz" else content


@pytest.mark.slow
def test_no_environment_variable_is_written(tmp_path):
    """A run with a bad record, a trace and a checkpoint, then one that fails."""
    encoded = {f"{i}.jpg": jpeg(20, 24, seed=i) for i in range(16)} | {"bad.jpg": b"no image"}
    dataset = write_images(tmp_path / "set", encoded)
    workdir, names = tmp_path / "run", ("MY_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    words = [
        "-m", "dgpt_jax.train", "--config=configs/quickstart.py", f"--config.data.path={dataset}",
        "--config.data.targets=pixels", "--config.loss.visible=0",
        "--config.data.max_bad_fraction=0.5",
        "--config.model.image_size=16", "--config.model.width=24", "--config.model.depth=1",
        "--config.model.heads=2", "--config.model.taps=1", "--config.model.decoder_depth=1",
        "--config.total=6 steps", "--config.batch_size=8", "--config.log_every=1",
        "--config.profile=2,4", "--config.evals.heldout=", "--config.evals.knn=",
        f"--workdir={workdir}",
    ]  # fmt: skip
    for more, code in (([], 0), (["--config.model.width=48"], 1)):
        process = processes.start([*words, *more], **dict.fromkeys(names, SECRET))
        (output,) = processes.outputs_of([process], timeout=300)
        assert process.returncode == code, output[-2000:]
        assert SECRET not in output and not any(name in output for name in names)
        assert ("bad.jpg" in output) == (code == 0)
    written = dict(all_files(workdir))
    kinds = {path.name.rpartition(".")[2] for path in written}
    assert {"jsonl", "json", "pb"} <= kinds and any("events" in path.name for path in written)
    for path, content in written.items():
        for word in (SECRET, *names):
            assert word.encode() not in content, path
    assert os.environ.get("MY_PASSWORD") is None
