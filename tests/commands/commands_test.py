"""Commands as users run them: bad input is one clear line and a non-zero exit; what is imported."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import build_tokens
import pytest

from dgpt_jax import cli, config, evaluate, hosts, train
from tests.data import image_dataset, random_teacher, token_store

ROOT = Path(__file__).parent.parent
QUICK = f"--config={ROOT / 'configs/quickstart.py'}"
TINY = [
    "--config.model.image_size=16", "--config.model.width=24", "--config.model.depth=2",
    "--config.model.heads=2", "--config.total=1 steps", "--config.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(image dataset, teacher, token store with 24 channels and a 4×4 grid)."""
    root = tmp_path_factory.mktemp("commands")
    dataset = image_dataset(root, per_class=4)
    teacher = random_teacher(root / "teacher")
    return dataset, teacher, token_store(root, dataset, teacher)


def refused(monkeypatch, main, *words) -> str:
    """The line with which a command ends on a user's error."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message  # sys.exit prints it to stderr and ends with 1


def train_refused(monkeypatch, tmp_path, path, *words) -> str:
    workdir = tmp_path / "run"
    words = (QUICK, f"--workdir={workdir}", f"--config.data.path={path}", *TINY, *words)
    message = refused(monkeypatch, train.main, *words)
    assert not workdir.exists()  # found before anything is made
    return message


def test_unknown_config_key(monkeypatch, tmp_path, made):
    message = train_refused(monkeypatch, tmp_path, made[2], "--config.optim.lr=1")
    assert message == "error: unknown config key config.optim.lr: did you mean config.optim.blr?"


def test_missing_directory(monkeypatch, tmp_path):
    message = train_refused(monkeypatch, tmp_path, tmp_path / "absent")
    assert f"no such directory: {tmp_path / 'absent'}" in message


def test_tokens_of_another_grid_or_width(monkeypatch, tmp_path, made):
    message = train_refused(monkeypatch, tmp_path, made[2], "--config.teacher.width=768")
    assert "holds teacher tokens of width 24, the config expects 768" in message
    message = train_refused(monkeypatch, tmp_path, made[2], "--config.teacher.grid=16")
    assert "holds teacher tokens of grid 4, the config expects 16" in message


def test_a_batch_that_is_not_divisible(monkeypatch, tmp_path, made):
    message = train_refused(monkeypatch, tmp_path, made[2], "--config.accum_steps=3")
    assert "config.batch_size 4 is not divisible by config.accum_steps 3" in message
    message = train_refused(monkeypatch, tmp_path, made[2], "--config.mesh.fsdp=3")
    assert "3" in message and "device" in message


def test_a_folder_without_images(monkeypatch, tmp_path):
    import import_images

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("no image")
    words = (tmp_path / "folder", f"--out={tmp_path / 'out'}")
    assert "no images" in refused(monkeypatch, import_images.main, *words)


def test_a_truncated_shard(monkeypatch, tmp_path, made):
    store = token_store(tmp_path, made[0], made[1])
    shard = next(store.glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    message = train_refused(monkeypatch, tmp_path, store)
    assert shard.name in message and "damaged or truncated" in message


def test_checkpoints_that_are_none(monkeypatch, tmp_path, made):
    import convert
    import plot

    words = (f"--config={ROOT / 'configs/knn_in1k.py'}", f"--config.data={made[0]}")
    message = refused(monkeypatch, evaluate.main, *words, f"--checkpoint={tmp_path}")
    assert "neither a work directory" in message
    message = refused(monkeypatch, convert.main, tmp_path / "x", tmp_path / "y", "--to=timm")
    assert str(tmp_path / "x") in message
    message = refused(monkeypatch, plot.main, tmp_path, f"--out={tmp_path / 'a.png'}")
    assert "no metrics.jsonl" in message


@pytest.mark.parametrize(
    "tool,words",
    [
        ("plot", "RUN --smooth=-1"),
        ("plot", "RUN --tolerance=nan"),
        ("report_run", "RUN --smooth=-2 --out=x.html"),
        ("visualize", "RUN x --count=0 --out=x.png"),
        ("visualize", "RUN x --neighbours=-1 --out=x.png"),
        ("visualize", "RUN x --view=-1 --out=x.png"),
        ("checkpoint", "inspect RUN --step=-1"),
        ("checkpoint", "average RUN x --last=0"),
        ("checkpoint", "average RUN x --decay=inf"),
        ("convert", "RUN x --to=timm --heads=0"),
        ("convert", "RUN x --to=timm --eps=-1e-6"),
        ("convert", "RUN x --to=timm --image_size=-224"),
        ("import_images", "RUN --out=x --shard_size=0"),
        ("import_images", "RUN --out=x --threads=0"),
        ("verify_tokens", "RUN --samples=0"),
        ("ablate", "views --out=x --seeds=0"),
        ("compare_codecs", "--examples=0"),
        ("compare_codecs", "--pca=-3"),
        ("replay", "RUN --layers=-1"),
        ("glyphs", "x --size=0"),
        ("quickstart", "--out=x --steps=0"),
    ],
)
def test_numbers_of_flags_have_a_range(monkeypatch, tmp_path, tool, words):
    monkeypatch.chdir(tmp_path)
    flags = (word.partition("=") for word in words.split() if "=" in word)
    flag, value = next((flag, value) for flag, _, value in flags if flag not in ("--out", "--to"))
    message = refused(monkeypatch, importlib.import_module(tool).main, *words.split())
    assert f"argument {flag}: {value} is not a number from" in message
    assert not list(tmp_path.iterdir())


def test_a_real_process_ends_with_1_and_no_traceback(tmp_path):
    words = ["-m", "dgpt_jax.train", QUICK, f"--workdir={tmp_path}", "--config.data.pth=x"]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    lines = ended.stderr.strip().splitlines()
    assert lines == ["error: unknown config key config.data.pth: did you mean config.data.path?"]


@pytest.mark.skipif(hosts._accelerators() == "a TPU", reason="there is a TPU")
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_platform_that_is_not_there(tmp_path, platform):
    """Never a silent CPU."""
    if platform == "gpu" and hosts._accelerators():
        pytest.skip("there is a GPU")
    words = ["-m", "dgpt_jax.train", QUICK, f"--workdir={tmp_path / 'run'}", "--config.data.path=x"]
    ended = subprocess.run(
        [sys.executable, *words, f"--config.platform={platform}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    # libtpu may say something too
    assert f"error: config.platform={platform} is not available: " in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys, dgpt_jax
# What is written in another framework is imported by nothing before that is asked for.
foreign = ("dgpt_jax.convert.digpt_torch", "bench_torch", "bench_input_tf")
names = [m.name for m in pkgutil.walk_packages(dgpt_jax.__path__, "dgpt_jax.")]
for name in names:
    if name not in foreign:
        importlib.import_module(name)
assert "tensorflow" not in sys.modules
for folder in ("configs", "tools"):
    sys.path.insert(0, folder)
    for path in pathlib.Path(folder).glob("*.py"):
        if path.stem not in foreign:
            importlib.import_module(path.stem)
        names.append(path.stem)
assert "tensorflow" not in sys.modules
import tensorflow  # the bait is there
print(len(names))
"""


@pytest.mark.smoke
def test_every_file_imports_and_none_imports_tensorflow(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("__version__ = '2.20.0'\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    files = [p for p in (ROOT / "dgpt_jax").rglob("*.py") if p.name != "__init__.py"]
    assert int(ended.stdout) >= len(files)


COMMANDS = {config.Train: train, config.Tokens: build_tokens, config.Evaluate: evaluate}


def fields(kind, prefix="--config."):
    """(flag, field) of everything that holds a value."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def printed(monkeypatch, capsys, main, *words) -> str:
    """What a command prints that ends with 0."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_help_lists_every_field(monkeypatch, capsys, kind):
    shown = printed(monkeypatch, capsys, COMMANDS[kind].main, "--help")
    assert max(map(len, shown.splitlines())) <= 100
    shown = " ".join(shown.split())
    known = dict(fields(kind))
    assert len(known) > 15
    for flag, field in known.items():
        assert field.metadata["doc"]
        start = shown.index(f" {flag} (") + 1
        told = shown[start : start + 500]
        assert f"default {field.default!r}): {' '.join(field.metadata['doc'].split())}" in told
    if kind is config.Train:
        assert (
            "--config.optim.blr (float, at least 0; default 0.00015): base learning rate" in shown
        )
        assert "--config.data.views (int | None, at least 1; default None): use the first" in shown


def test_print_config(monkeypatch, capsys):
    """Of nothing but a config file; resolved, every field once, and nothing is made or read."""
    words = (QUICK, "--config.data.path=/absent", "--config.model.taps=None", "--print_config")
    lines = printed(monkeypatch, capsys, train.main, *words).splitlines()
    told = dict(line.split(" = ") for line in lines[:-1])
    assert [f"--{name}" for name in told] == [flag for flag, _ in fields(config.Train)]
    assert told["config.model.taps"] == "(3, 4, 5, 6)"  # by depth
    assert told["config.batch_size"] == "64" and told["config.data.path"] == "'/absent'"
    assert lines[-1].startswith("next: ")
    # what is not whole is shown, too, with what it lacks
    message = refused(monkeypatch, train.main, QUICK, "--print_config")
    assert message.startswith("error: config.data.path is empty")
    assert "config.batch_size = 64\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        (["--wrokdir=x"], "unknown flag --wrokdir: did you mean --workdir?"),
        (["--log_every=8"], "unknown flag --log_every: did you mean --config.log_every?"),
        (["--keep"], "did you mean --config.checkpoint.keep?"),
        (["--model.width", "8"], "unknown flag --model.width: did you mean --config.model.width?"),
        (["--allow_config_chang"], "did you mean --allow_config_change?"),
        (["--qqqqqqqqqqq"], "unknown flag --qqqqqqqqqqq (--help"),
        (["stray", "--workdir=x"], "unknown argument stray"),
        (["--workdir=x", "--config.seed"], "--config.seed needs a value"),
        ([], "the following arguments are required: --workdir"),
    ],
)
def test_flags_that_are_none(monkeypatch, words, message):
    assert message in refused(monkeypatch, train.main, QUICK, *words)


def test_a_command_without_config(monkeypatch):
    import convert

    message = refused(monkeypatch, convert.main, "a", "b", "--to=timm", "--pool=cls")
    assert "unknown flag --pool: did you mean --pooling?" in message
    message = refused(monkeypatch, convert.main, "a", "b", "--to=timm", "--config.x=1")
    assert "unknown flag --config.x" in message
