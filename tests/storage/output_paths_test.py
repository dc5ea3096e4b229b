"""Output paths that cannot be written are refused before the work begins."""

import errno
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from dgpt_jax import cli
from dgpt_jax.errors import UserError
from dgpt_jax.storage import output_paths
from tests.support import commands, gcs
from tests.support.paths import ROOT

# {command: arguments}. OUT is the output; all other paths are missing, so the work would fail.
FILES = {
    "evaluate": f"--config={ROOT}/configs/knn_in1k.py --config.data=x --checkpoint=x "
    "--out=OUT.json",
    "plot": "x --out=OUT.png",
    "report": "x --out=OUT.html",
    "visualize": "x y.png --out=OUT.png",
    "plan": f"--config={ROOT}/configs/pretrain_b16_in1k.py --config.data.path=x --plot=OUT.png",
    "convert": "x OUT.pth --to=digpt",
    "checkpoint": "extract x OUT.safetensors",
    "curves": "x --metrics=loss --out=OUT.csv",
}
DIRECTORIES = {
    "train": f"--config={ROOT}/configs/quickstart.py --config.data.path=x --workdir=OUT",
    "build_tokens": f"--config={ROOT}/configs/quickstart_tokens.py --config.source=x "
    "--config.teacher.weights=x --out=OUT",
    "convert": "x OUT --to=timm",
    "checkpoint": "average x OUT",
    "import_images": "x --out=OUT",
    "embed": "x --checkpoint=x --out=OUT",
    "ablate": "views --out=OUT",
    "continued": "--out=OUT",
    "quickstart": "--out=OUT",
    "image_sets": "OUT --images=glyphs",
    "small_teacher": "x OUT --images=scenes",
    "measure": "OUT raw --images=scenes",
    "bench_input": "store --dir=OUT",
    "bench_tokens": "--dir=OUT",
}


def refused(monkeypatch, command: str, arguments: str) -> str:
    """The error line of a command."""
    main = commands.module_of(command).main
    monkeypatch.setattr(sys, "argv", [command, *shlex.split(arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert isinstance(ended.value.code, str), ended.value.code
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
    return ended.value.code


def below_a_file(root: Path, out: str) -> Path:
    (root / "file").write_text("")
    return root / "file" / "deep" / out


def unwritable(root: Path, out: str) -> Path:
    """A path that root cannot write either."""
    return Path("/proc/dgpt_jax") / out


def directory(root: Path, out: str) -> Path:
    (root / out).mkdir()
    return root / out


def pipe(root: Path, out: str) -> Path:
    os.mkfifo(root / out)
    return root / out


def a_file(root: Path, out: str) -> Path:
    (root / out).write_text("")
    return root / out


def dangling(root: Path, out: str) -> Path:
    (root / "link").symlink_to(root / "absent")
    return root / "link" / out


def other_suffix(root: Path, out: str) -> Path:
    return root / "x.xyz"


FAULTS = {
    below_a_file: "cannot be written: .*file is a file",
    dangling: "cannot be written: .*link is not a directory",
    unwritable: "cannot be written: ",
    directory: "is a directory",
    pipe: "is not a regular file",
}
ROWS = [(command, arguments, fault) for command, arguments in FILES.items() for fault in FAULTS]
ROWS += [(command, FILES[command], other_suffix) for command in ("plot", "visualize", "plan")]
ROWS += [
    (command, arguments, fault)
    for command, arguments in DIRECTORIES.items()
    for fault in (below_a_file, dangling, unwritable, a_file)
]


@pytest.mark.parametrize(
    "command,arguments,fault",
    ROWS,
    ids=lambda x: x if isinstance(x, str) and " " not in x else None,
)
def test_outputs_that_cannot_be_written(monkeypatch, tmp_path, command, arguments, fault):
    flag = next(flag for flag in shlex.split(arguments) if "OUT" in flag)
    name = flag.rpartition("=")[2]
    path = fault(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    message = refused(monkeypatch, command, arguments.replace(name, str(path)))
    assert str(path) in message
    assert re.search(FAULTS.get(fault, "must end in .*png|is a file|names a file"), message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command,arguments,existing",
    [
        ("convert", "x OUT --to=timm", "OUT/model.safetensors"),
        ("convert", "x OUT.pth --to=digpt", "OUT.pth"),
        ("checkpoint", "extract x OUT.safetensors", "OUT.safetensors"),
        ("checkpoint", "average x OUT", "OUT/checkpoints/1/params"),
    ],
)
def test_weights_are_not_overwritten(monkeypatch, tmp_path, command, arguments, existing):
    """Checked before the source, which is missing."""
    path = Path(existing.replace("OUT", str(tmp_path / "out")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("weights")
    message = refused(monkeypatch, command, arguments.replace("OUT", str(tmp_path / "out")))
    assert "exists" in message and path.read_text() == "weights"


@pytest.mark.parametrize("command,arguments", [*FILES.items(), *DIRECTORIES.items()])
def test_parents_may_be_missing(monkeypatch, tmp_path, command, arguments):
    if command in (
        "quickstart",
        "image_sets",
        "measure",  # its output directory is its input
        "bench_input",
        "bench_tokens",
        "ablate",
        "continued",
        "plan",
    ):
        pytest.skip("it would start its work")
    path = tmp_path / "a/b/OUT"
    assert str(path) not in refused(monkeypatch, command, arguments.replace("OUT", str(path)))
    assert not list(tmp_path.iterdir())


def test_a_read_only_file_system(monkeypatch, tmp_path):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system", "/x/tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    for check in (output_paths.file, output_paths.directory):
        with pytest.raises(UserError, match="x cannot be written: Read-only file system$"):
            check(tmp_path / "x")


@pytest.mark.parametrize("command,out", [("plot", "x.png"), ("report", "x.html")])
def test_a_full_disk(monkeypatch, tmp_path, command, out):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    monkeypatch.setattr(os, "replace", full)
    message = refused(monkeypatch, command, f"{tmp_path} --out={tmp_path}/{out}")
    assert message == f"error: {tmp_path}/{out} cannot be written: No space left on device"
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_outputs_on_gs(monkeypatch):
    with gcs.Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        output_paths.file("gs://bucket/new/x.json")
        output_paths.directory("gs://bucket/new")
        assert not server.objects
        server.forbidden = "new/"
        for check, path in ((output_paths.file, "new/x.json"), (output_paths.directory, "new")):
            with pytest.raises(
                UserError, match=f"gs://bucket/{path} cannot be written: .*Forbidden"
            ):
                check(f"gs://bucket/{path}")


@pytest.mark.parametrize(
    "command,arguments", [*FILES.items(), ("image_sets", "OUT --images=glyphs")]
)
def test_local_outputs_are_refused_on_gs(monkeypatch, tmp_path, command, arguments):
    """They would create a directory named gs:."""
    if command == "evaluate":
        pytest.skip("it can write results to gs://")
    monkeypatch.chdir(tmp_path)
    message = refused(monkeypatch, command, arguments.replace("OUT", "gs://bucket/OUT"))
    assert "is not on a local disk" in message and not list(tmp_path.iterdir())
