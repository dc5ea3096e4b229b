"""A place that cannot be written to is found before the work whose result goes there."""

import errno
import importlib
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from dgpt_jax import cli, evaluate, outputs, train
from dgpt_jax.schema import UserError
from tests import gcs

ROOT = Path(__file__).parent.parent
# command: its words; OUT is what it writes, and all else that it names is not there. The work would
# end with an error about that.
FILES = {
    "evaluate": f"--config={ROOT}/configs/knn_in1k.py --config.data=x --checkpoint=x "
    "--out=OUT.json",
    "plot": "x --out=OUT.png",
    "report_run": "x --out=OUT.html",
    "visualize": "x y.png --out=OUT.png",
    "plan": f"--config={ROOT}/configs/pretrain_b16_in1k.py --config.data.path=x --plot=OUT.png",
    "convert": "x OUT.pth --to=digpt",
    "checkpoint": "extract x OUT.safetensors",
}
DIRECTORIES = {
    "train": f"--config={ROOT}/configs/quickstart.py --config.data.path=x --workdir=OUT",
    "build_tokens": f"--config={ROOT}/configs/quickstart_tokens.py --config.source=x "
    "--config.teacher.weights=x --out=OUT",
    "convert": "x OUT --to=timm",
    "checkpoint": "average x OUT",
    "import_images": "x --out=OUT",
    "ablate": "views --out=OUT",
    "quickstart": "--out=OUT",
    "glyphs": "OUT",
    "bench_input": "store --dir=OUT",
    "bench_tokens": "--dir=OUT",
}
MODULES = {"train": train, "evaluate": evaluate}


def refused(monkeypatch, command: str, words: str) -> str:
    """The line that a command ends with."""
    main = (MODULES.get(command) or importlib.import_module(command)).main
    monkeypatch.setattr(sys, "argv", [command, *shlex.split(words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert isinstance(ended.value.code, str), ended.value.code
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    return ended.value.code


def below_a_file(place: Path, out: str) -> Path:
    (place / "file").write_text("")
    return place / "file" / "deep" / out


def unwritable(place: Path, out: str) -> Path:
    """Where root cannot write either."""
    return Path("/proc/dgpt_jax") / out


def directory(place: Path, out: str) -> Path:
    (place / out).mkdir()
    return place / out


def pipe(place: Path, out: str) -> Path:
    os.mkfifo(place / out)
    return place / out


def a_file(place: Path, out: str) -> Path:
    (place / out).write_text("")
    return place / out


def dangling(place: Path, out: str) -> Path:
    (place / "link").symlink_to(place / "absent")
    return place / "link" / out


def other_suffix(place: Path, out: str) -> Path:
    return place / "x.xyz"


FAULTS = {
    below_a_file: "cannot be written: .*file is a file",
    dangling: "cannot be written: .*link is no directory",
    unwritable: "cannot be written: ",
    directory: "is a directory",
    pipe: "is no regular file",
}
ROWS = [(command, words, fault) for command, words in FILES.items() for fault in FAULTS]
ROWS += [(command, FILES[command], other_suffix) for command in ("plot", "visualize", "plan")]
ROWS += [
    (c, words, fault)
    for c, words in DIRECTORIES.items()
    for fault in (below_a_file, dangling, unwritable, a_file)
]


@pytest.mark.parametrize(
    "command,words,fault", ROWS, ids=lambda x: x if isinstance(x, str) and " " not in x else None
)
def test_a_place_that_cannot_be_written_to(monkeypatch, tmp_path, command, words, fault):
    word = next(word for word in shlex.split(words) if "OUT" in word)
    name = word.rpartition("=")[2]
    path = fault(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    found = refused(monkeypatch, command, words.replace(name, str(path)))
    expected = FAULTS.get(fault, "must end in .*png|is a file|names a file")
    assert str(path) in found
    assert re.search(expected, found)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command,words,taken",
    [
        ("convert", "x OUT --to=timm", "OUT/model.safetensors"),
        ("convert", "x OUT.pth --to=digpt", "OUT.pth"),
        ("checkpoint", "extract x OUT.safetensors", "OUT.safetensors"),
        ("checkpoint", "average x OUT", "OUT/checkpoints/1/params"),
    ],
)
def test_weights_are_not_written_over(monkeypatch, tmp_path, command, words, taken):
    """Which is told before the source, which is not there, is looked for."""
    path = Path(taken.replace("OUT", str(tmp_path / "out")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("weights")
    message = refused(monkeypatch, command, words.replace("OUT", str(tmp_path / "out")))
    assert "is there already" in message and path.read_text() == "weights"


@pytest.mark.parametrize("command,words", [*FILES.items(), *DIRECTORIES.items()])
def test_a_missing_parent_is_no_fault(monkeypatch, tmp_path, command, words):
    if command in ("quickstart", "glyphs", "bench_input", "bench_tokens", "ablate", "plan"):
        pytest.skip("the work would begin")
    path = tmp_path / "a/b/OUT"
    assert str(path) not in refused(monkeypatch, command, words.replace("OUT", str(path)))
    assert not list(tmp_path.iterdir())


def test_a_read_only_file_system(monkeypatch, tmp_path):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system", "/x/tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    for check in (outputs.file, outputs.directory):
        with pytest.raises(UserError, match="x cannot be written: Read-only file system$"):
            check(tmp_path / "x")


@pytest.mark.parametrize("command,out", [("plot", "x.png"), ("report_run", "x.html")])
def test_a_disk_that_becomes_full(monkeypatch, tmp_path, command, out):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    monkeypatch.setattr(os, "replace", full)
    found = refused(monkeypatch, command, f"{tmp_path} --out={tmp_path}/{out}")
    assert found == f"error: {tmp_path}/{out} cannot be written: No space left on device"
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_place_on_gs(monkeypatch):
    with gcs.Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        outputs.file("gs://bucket/new/x.json")
        outputs.directory("gs://bucket/new")
        assert not server.objects
        server.forbidden = "new/"
        for check, path in ((outputs.file, "new/x.json"), (outputs.directory, "new")):
            with pytest.raises(
                UserError, match=f"gs://bucket/{path} cannot be written: .*Forbidden"
            ):
                check(f"gs://bucket/{path}")


@pytest.mark.parametrize("command,words", [*FILES.items(), ("glyphs", "OUT")])
def test_what_is_local_is_not_written_to_gs(monkeypatch, tmp_path, command, words):
    """Or a directory of the name gs: would be made."""
    if command == "evaluate":
        pytest.skip("results may lie on gs://")
    monkeypatch.chdir(tmp_path)
    found = refused(monkeypatch, command, words.replace("OUT", "gs://bucket/OUT"))
    assert "is not on a local disk" in found and not list(tmp_path.iterdir())
