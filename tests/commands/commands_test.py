"""Commands as users run them: bad input is one clear line and a non-zero exit; imports."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from dgpt_jax import cli, evaluate, train
from dgpt_jax.commands import build_tokens
from dgpt_jax.config import files, roots, schema
from dgpt_jax.distributed import launchers
from dgpt_jax.errors import UserError
from tests.support import commands
from tests.support.data import image_dataset, random_teacher, token_store
from tests.support.paths import ROOT

QUICK = f"--config={ROOT / 'configs/quickstart.py'}"
TINY = [
    "--config.model.image_size=16", "--config.model.width=24", "--config.model.depth=2",
    "--config.model.heads=2", "--config.total=1 steps", "--config.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(image dataset, teacher, token store with 24 channels and a 4×4 grid)."""
    root = tmp_path_factory.mktemp("commands")
    dataset = image_dataset(root, per_class=4)
    teacher = random_teacher(root / "teacher")
    return dataset, teacher, token_store(root, dataset, teacher)


def refused(monkeypatch, main, *words) -> str:
    """The last line of a command that a user error ends."""
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
    assert not workdir.exists()  # checked before anything is written
    return message


def test_unknown_config_key(monkeypatch, tmp_path, data):
    message = train_refused(monkeypatch, tmp_path, data[2], "--config.optim.lr=1")
    assert "config.optim.lr:" in message and "config.optim.blr" in message


def test_missing_directory(monkeypatch, tmp_path):
    message = train_refused(monkeypatch, tmp_path, tmp_path / "absent")
    assert f"no such directory: {tmp_path / 'absent'}" in message


def test_tokens_of_another_grid_or_width(monkeypatch, tmp_path, data):
    message = train_refused(monkeypatch, tmp_path, data[2], "--config.teacher.width=768")
    assert "width 24" in message and "768" in message
    message = train_refused(monkeypatch, tmp_path, data[2], "--config.teacher.grid=16")
    assert "grid 4" in message and "16" in message


def test_a_batch_that_is_not_divisible(monkeypatch, tmp_path, data):
    message = train_refused(monkeypatch, tmp_path, data[2], "--config.accum_steps=3")
    assert "config.batch_size" in message and "config.accum_steps" in message
    message = train_refused(monkeypatch, tmp_path, data[2], "--config.mesh.fsdp=3")
    assert "3" in message and "device" in message


def test_a_folder_without_images(monkeypatch, tmp_path):
    from dgpt_jax.commands import import_images

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("no image")
    words = (tmp_path / "folder", f"--out={tmp_path / 'out'}")
    assert "no images" in refused(monkeypatch, import_images.main, *words)


def test_a_truncated_shard(monkeypatch, tmp_path, data):
    store = token_store(tmp_path, data[0], data[1])
    shard = next(store.glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    message = train_refused(monkeypatch, tmp_path, store)
    assert shard.name in message


def test_missing_checkpoints(monkeypatch, tmp_path, data):
    from dgpt_jax.commands import convert, plot

    words = (f"--config={ROOT / 'configs/knn_in1k.py'}", f"--config.data={data[0]}")
    message = refused(monkeypatch, evaluate.main, *words, f"--checkpoint={tmp_path}")
    assert str(tmp_path) in message
    message = refused(monkeypatch, convert.main, tmp_path / "x", tmp_path / "y", "--to=timm")
    assert str(tmp_path / "x") in message
    message = refused(monkeypatch, plot.main, tmp_path, f"--out={tmp_path / 'a.png'}")
    assert "metrics.jsonl" in message


@pytest.mark.parametrize(
    "tool,words",
    [
        ("plot", "RUN --smooth=-1"),
        ("plot", "RUN --tolerance=nan"),
        ("report", "RUN --smooth=-2 --out=x.html"),
        ("visualize", "RUN x --count=0 --out=x.png"),
        ("visualize", "RUN x --neighbors=-1 --out=x.png"),
        ("visualize", "RUN x --view=-1 --out=x.png"),
        ("checkpoint", "inspect RUN --step=-1"),
        ("checkpoint", "average RUN x --last=0"),
        ("checkpoint", "average RUN x --decay=inf"),
        ("convert", "RUN x --to=timm --heads=0"),
        ("convert", "RUN x --to=timm --eps=-1e-6"),
        ("convert", "RUN x --to=timm --image_size=-224"),
        ("import_images", "RUN --out=x --shard_size=0"),
        ("import_images", "RUN --out=x --threads=0"),
        ("embed", "RUN --batch_size=0 --checkpoint=x --out=x"),
        ("embed", "RUN --shard_size=0 --checkpoint=x --out=x"),
        ("embed", "RUN --max_bad_fraction=-1 --checkpoint=x --out=x"),
        ("verify_tokens", "RUN --samples=0"),
        ("ablate", "views --out=x --seeds=0"),
        ("compare_codecs", "--examples=0"),
        ("store", "extract TOKENS x --count=0"),
        ("store", "info TOKENS --sample=0"),
        ("compare_codecs", "--pca=-3"),
        ("replay", "RUN --layers=-1"),
        ("image_sets", "x --size=0 --images=scenes"),
        ("quickstart", "--out=x --steps=0"),
        ("pretrain", "SRC --epochs=0 --teacher=x --out=x"),
        ("pretrain", "SRC --image-size=0 --teacher=x --out=x"),
        ("pretrain", "SRC --memory=-1 --teacher=x --out=x"),
    ],
)
def test_numbers_of_flags_have_a_range(monkeypatch, tmp_path, tool, words):
    monkeypatch.chdir(tmp_path)
    flags = (word.partition("=") for word in words.split() if "=" in word)
    flag, value = next((flag, value) for flag, _, value in flags if flag not in ("--out", "--to"))
    message = refused(monkeypatch, commands.module_of(tool).main, *words.split())
    assert re.search(rf"argument {flag}(/--\w+)?: {re.escape(value)} ", message)
    assert not list(tmp_path.iterdir())


def test_a_real_process_ends_with_1_and_no_traceback(tmp_path):
    words = ["-m", "dgpt_jax.train", QUICK, f"--workdir={tmp_path}", "--config.data.pth=x"]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and "config.data.pth:" in lines[0] and "config.data.path" in lines[0]


@pytest.mark.skipif(launchers.local_accelerator() == "a TPU", reason="there is a TPU")
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_an_unavailable_platform(tmp_path, platform):
    """Never falls back to the CPU silently."""
    if platform == "gpu" and launchers.local_accelerator():
        pytest.skip("there is a GPU")
    words = ["-m", "dgpt_jax.train", QUICK, f"--workdir={tmp_path / 'run'}", "--config.data.path=x"]
    ended = subprocess.run(
        [sys.executable, *words, f"--config.platform={platform}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    # libtpu may print lines of its own
    assert f"error: config.platform={platform} " in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys, dgpt_jax, tools
# Modules for another framework are imported on demand only.
bench = "tools.benchmarks.bench_"
foreign = ("dgpt_jax.weights.official_torch", bench + "torch", bench + "input_tf")
names = [
    module.name
    for package in (dgpt_jax, tools)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
for name in names:
    if name not in foreign:
        importlib.import_module(name)
assert "tensorflow" not in sys.modules
sys.path.insert(0, "configs")
for path in pathlib.Path("configs").glob("*.py"):
    importlib.import_module(path.stem)
    names.append(path.stem)
assert "tensorflow" not in sys.modules
import tensorflow  # the stand-in is importable
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


COMMANDS = {
    roots.TrainConfig: train,
    roots.TokensConfig: build_tokens,
    roots.EvaluateConfig: evaluate,
}


def fields(kind, prefix="--config."):
    """(flag, field) of every leaf of a config."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        elif named := schema.named_schema(field):
            yield from fields(named, f"{prefix}{field.name}.NAME.")
        else:
            yield f"{prefix}{field.name}", field


def printed(monkeypatch, capsys, main, *words) -> str:
    """Output of a command that exits with 0."""
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
    flags = dict(fields(kind))
    assert len(flags) > 15
    for flag, field in flags.items():
        assert field.metadata["doc"]
        start = shown.index(f" {flag} (") + 1
        doc = " ".join(field.metadata["doc"].split())
        assert f"default {field.default!r}): {doc}" in shown[start : start + 500]
    if kind is roots.TrainConfig:
        assert "--config.optim.blr (float, at least 0; default 0.00015): " in shown
        assert "--config.data.views (int | None, at least 1; default None): " in shown


def test_print_config(monkeypatch, capsys):
    """Needs a config file alone; resolved, every field once, nothing is read or written."""
    words = (QUICK, "--config.data.path=/absent", "--config.model.taps=None", "--print_config")
    lines = printed(monkeypatch, capsys, train.main, *words).splitlines()
    values = dict(line.split(" = ") for line in lines[:-1])
    flags = [flag for flag, _ in fields(roots.TrainConfig) if ".NAME." not in flag]
    assert [f"--{name}" for name in values] == flags
    assert values["config.model.taps"] == "(3, 4, 5, 6)"  # by depth
    assert values["config.batch_size"] == "64" and values["config.data.path"] == "'/absent'"
    assert lines[-1].startswith("next: ")
    # an incomplete config is printed too, followed by its error
    message = refused(monkeypatch, train.main, QUICK, "--print_config")
    assert message.startswith("error: config.data.path ")
    assert "config.batch_size = 64\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        (["--wrokdir=x"], "--wrokdir: did you mean --workdir?"),
        (["--log_every=8"], "--log_every: did you mean --config.log_every?"),
        (["--keep"], "did you mean --config.checkpoint.keep?"),
        (["--model.width", "8"], "--model.width: did you mean --config.model.width?"),
        (["--allow_config_chang"], "did you mean --allow_config_change?"),
        (["--qqqqqqqqqqq"], "--qqqqqqqqqqq (see --help"),
        (["stray", "--workdir=x"], "unknown argument stray"),
        (["--workdir=x", "--config.seed"], "--config.seed needs a value"),
        ([], "--workdir"),
    ],
)
def test_unknown_and_missing_flags(monkeypatch, words, message):
    assert message in refused(monkeypatch, train.main, QUICK, *words)


def test_a_command_without_config(monkeypatch):
    from dgpt_jax.commands import convert

    message = refused(monkeypatch, convert.main, "a", "b", "--to=timm", "--pool=cls")
    assert "--pool: did you mean --pooling?" in message
    message = refused(monkeypatch, convert.main, "a", "b", "--to=timm", "--config.x=1")
    assert "unknown flag --config.x" in message


CONFIG = """
def get_config():
    return default_config(TrainConfig)
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from dgpt_jax.schema import default", "dgpt_jax.schema"),
        ("from dgpt_jax.config import Train", "Train"),
        ("from dgpt_jax.config import Tokens", "Tokens"),
        ("from dgpt_jax import schema", "schema"),
        ("import dgpt_jax.sections", "dgpt_jax.sections"),
        ("from dgpt_jax.config import TrainConfig, default_config", ""),
    ],
)
def test_imports_of_an_old_config_file(tmp_path, line, name):
    file = tmp_path / "old.py"
    file.write_text(line + CONFIG)
    if not name:
        assert files.load_config(str(file)).seed == 0
        return
    with pytest.raises(UserError) as caught:
        files.load_config(str(file))
    message = str(caught.value)
    assert message.startswith(f"{file}:1: ") and "\n" not in message
    assert f"{name}'" in message and f"`{files.CONFIG_IMPORT}`" in message


def test_configs_import_dgpt_jax_config_alone():
    for file in (ROOT / "configs").glob("*.py"):
        imports = re.findall(r"(?:from|import) (dgpt_jax\S*)", file.read_text())
        assert set(imports) <= {"dgpt_jax.config"}, file
