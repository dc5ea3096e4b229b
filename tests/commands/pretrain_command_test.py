"""`dgpt pretrain`: the commands it stands for, what it chooses and refuses; nothing is trained."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dgpt_jax
from dgpt_jax import cli, invocation
from dgpt_jax.commands import jobs, pretrain, pretrain_setup, pretrain_source, pretrain_summary
from dgpt_jax.commands.pretrain_source import Source
from dgpt_jax.config import EvaluateConfig, TokensConfig, TrainConfig
from dgpt_jax.data.ingest import importer
from dgpt_jax.errors import UserError
from dgpt_jax.planning import machine_probe
from dgpt_jax.storage import disk_space, tfds_dataset
from tests.support import data
from tests.support.paths import ROOT

TEACHER = {"weights": "TEACHER", "image_size": 16, "tokens": 17, "width": 24}
DEVICES = {"platform": "cpu", "kind": "cpu", "count": 1, "memory": 8 * 2**30}
SCHEMAS = {"tokens": TokensConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
ALL = ["import", "tokens", "tokens_heldout", "verify", "train", "export", "knn", "report"]


@pytest.fixture
def probe(monkeypatch):
    """Answers of machine_probe, which a test may change."""
    answer = {"teacher": dict(TEACHER), "devices": dict(DEVICES), "init": None}
    monkeypatch.setattr(machine_probe, "run", lambda *_: json.loads(json.dumps(answer)))
    return answer


@pytest.fixture
def ran(monkeypatch):
    """Names of the jobs that would run, in order; `import` imports."""
    names = []

    def run(commands, logs, groups):
        logs.mkdir(parents=True, exist_ok=True)
        for job in jobs.pending(commands, logs):
            names.append(job.name)
            if job.name == "import":
                src, out = job.words[3], job.words[4].removeprefix("--out=")
                importer.import_images(src, out, say=lambda _: None)
            else:
                job.output.mkdir(parents=True, exist_ok=True)
            (logs / f"{job.name}.txt").write_text(f"{job.line}\n")

    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(pretrain_summary, "lines", lambda _: ["summary"])
    return names


@pytest.fixture
def folder(tmp_path):
    data.write_folder(tmp_path / "photos", 20)
    (tmp_path / "clip").mkdir()
    return tmp_path


def call(root: Path, **options):
    return dgpt_jax.pretrain(
        options.pop("folder", root / "photos"), root / "clip", root / "out",
        **{"size": "Ti/4"} | options,
    )  # fmt: skip


def commands_of(text: str) -> dict[str, list[str]]:
    """{name of the command: its arguments}, of a dry run; the first of each name."""
    forms = {f"{invocation.command(name)} ": name for name in invocation.COMMANDS}
    printed = {}
    for line in text.splitlines():
        for form in filter(line.startswith, forms):
            printed.setdefault(forms[form], shlex.split(line.removeprefix(form)))
    return printed


def test_a_dry_run_prints_commands_that_parse(folder, probe, capsys):
    call(folder, dry_run=True)
    printed = commands_of(capsys.readouterr().out)
    assert list(printed) == ["import", "tokens", "verify", "train", "convert", "evaluate", "report"]
    assert not (folder / "out").exists()
    parsed = {}
    for name, schema in SCHEMAS.items():
        words = [word for word in printed[name] if word.startswith("--config")]
        parsed[name] = cli.parse(cli.parser("", schema), schema, words)[1]
    tokens, train, evaluate = parsed.values()
    assert tokens.split == evaluate.train == "train[0:18]+train[20:38]"
    assert evaluate.test == "train[18:20]+train[38:40]" and tokens.views == 8
    assert (train.batch_size, train.dtype, train.model.width) == (16, "float32", 192)
    assert train.model.image_size == tokens.image_size == 16
    assert train.optim.blr * train.batch_size / 256 == pytest.approx(1.5e-4 / 16)
    assert train.data.path == str(folder / "out/tokens") and train.evals.label_free == 4


def test_stages_run_once_and_in_order(folder, probe, ran):
    assert call(folder) == folder / "out/timm"
    assert ran == ALL
    call(folder)
    assert ran == ALL  # nothing again
    (folder / "out/logs/train.txt").unlink()
    call(folder)
    assert ran == [*ALL, *ALL[4:]]
    probe["devices"]["memory"] = 2**30  # what was chosen at the start stays
    call(folder)
    assert len(ran) == len(ALL) + 4


def test_unreadable_images_are_not_counted(folder, probe, ran, capsys):
    (folder / "photos/a/000.png").write_bytes(b"no image")
    call(folder)
    assert ran == ALL
    printed = commands_of(capsys.readouterr().out.split("without them:")[1])
    assert "--config.split=train[0:17]+train[19:37]" in printed["tokens"]


@pytest.mark.parametrize(
    "changed,flag",
    [
        ({"size": "S/4"}, "--size=Ti/4"), ({"epochs": 3}, "--epochs=the default"),
        ({"views": 2}, "--views"), ({"batch": 8}, "--batch"), ({"image_size": 32}, "--image-size"),
        ({"heldout": 0.2}, "--heldout"), ({"memory": 4.0}, "--memory"), ({"init": "x"}, "--init"),
        ({"folder": "/other"}, "FOLDER="),
    ],
)  # fmt: skip
def test_changed_options_are_refused(folder, probe, ran, changed, flag):
    call(folder)
    with pytest.raises(UserError) as refused:
        call(folder, **changed)
    assert flag in str(refused.value) and "\n" not in str(refused.value)
    assert ran == ALL


@pytest.mark.parametrize(
    "options,text",
    [
        ({"folder": "/nonexistent"}, "/nonexistent"),
        ({"folder": "{root}/clip"}, "contains no images"),
        ({"folder": "{root}/few"}, "7 images"),
        ({"size": "M/16"}, "--size=M/16"),
        ({"size": "S"}, "--size=S"),
        ({"size": "S/0"}, "--size=S/0"),
        ({"image_size": 30}, "--image-size=30"),
        ({"epochs": 0}, "--epochs=0"),
        ({"batch": -1}, "--batch=-1"),
        ({"memory": float("nan")}, "--memory=nan"),
        ({"memory": 0.01}, "--size"),
        ({"heldout": "0"}, "--heldout=0"),
        ({"heldout": "tset"}, "--heldout=tset"),
        ({"heldout": "train"}, "--heldout=train"),
        ({"views": "2"}, "--views=2"),
        ({"sise": "S/16"}, "sise"),
    ],
)
def test_refusals(folder, probe, ran, options, text):
    data.write_folder(folder / "few", 7, classes=("a",))
    options = {k: v.format(root=folder) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError) as refused:
        call(folder, **options)
    assert text in str(refused.value) and "\n" not in str(refused.value)
    assert not ran and not (folder / "out").exists()
    call(folder)  # the same directory is good for a corrected command
    assert ran == ALL


def test_a_missing_teacher(folder, ran):
    """Not a file, nor a directory with weights: by the process that reads it."""
    with pytest.raises(UserError, match="--teacher"):
        dgpt_jax.pretrain(folder / "photos", folder / "none", folder / "out")
    with pytest.raises(UserError) as refused:
        dgpt_jax.pretrain(folder / "photos", folder / "clip", folder / "out", size="Ti/4")
    assert str(folder / "clip") in str(refused.value) and "\n" not in str(refused.value)


def test_outputs_that_are_refused(folder, probe, ran, monkeypatch):
    (folder / "file").write_text("")
    for out in (folder / "file", folder / "file/x", folder / "photos"):
        with pytest.raises(UserError) as refused:
            dgpt_jax.pretrain(folder / "photos", folder / "clip", out)
        assert str(out) in str(refused.value)
    assert not (folder / "photos/.lock").exists()
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 10**6)
    with pytest.raises(UserError) as refused:
        call(folder)
    assert "1.00 MB free" in str(refused.value) and "--views" in str(refused.value)
    assert not ran


def test_one_process_per_directory(folder, probe, ran):
    (folder / "out").mkdir()
    with pretrain._hold(folder / "out"), pytest.raises(UserError, match="another process"):
        call(folder)
    call(folder)


def test_a_dataset_needs_no_import(folder, probe, ran):
    dataset = data.image_dataset(folder)
    call(folder, folder=dataset)
    # Whether it is sorted by class is unknown, so that its slices are no test of kNN.
    assert ran == [name for name in ALL if name not in ("import", "knn")]


@pytest.mark.parametrize("heldout,images", [(None, 8), ("0.25", 8), ("val", 8)])
def test_a_split_for_tests_is_held_out(folder, probe, ran, capsys, heldout, images):
    for split, count in (("train", 16), ("val", 4)):
        data.write_folder(folder / "splits", count, split=split)
    call(folder, folder=folder / "splits", heldout=heldout)
    assert ran == ALL
    test = "train[12:16]+train[28:32]" if heldout == "0.25" else "val"
    assert f"--config.test={test}" in capsys.readouterr().out.replace("'", "")


@pytest.mark.parametrize("images", [8, 9, 19, 100, 1234, 1_281_167])
@pytest.mark.parametrize("starts", [[], [0, 3], [0, 1, 2, 5]])
@pytest.mark.parametrize("share", [None, "0.1", "0.5"])
def test_slices_divide_all_images(images, starts, share):
    source = Source("x", True, 0, {"train": images}, ("train",), {"train": starts})
    division = pretrain_source.divide(source, share)
    rows = np.zeros(images, int)
    for text, value in ((division.train, 1), (division.heldout, 2)):
        for part in text.split("+"):
            start, end = map(int, part.removeprefix("train[").removesuffix("]").split(":"))
            assert start < end
            rows[start:end] += value
    assert np.array_equal(np.bincount(rows, minlength=3)[1:],
                          [division.train_images, division.heldout_images])  # fmt: skip
    assert division.heldout_images >= 1 and division.labelled == bool(starts)
    if share is None:
        assert division.heldout_images <= pretrain_source.MAX_HELD_OUT * 1.01
    for start in starts:  # a class is never held out as a whole
        assert rows[start] == 1


def test_slices_are_read_by_tfds(tmp_path):
    dataset = data.image_dataset(tmp_path, per_class=20)
    division = pretrain_source.divide(pretrain_source.inspect(str(dataset), print), None)
    train, heldout = (tfds_dataset.Split(dataset, s) for s in (division.train, division.heldout))
    assert (len(train), len(heldout)) == (division.train_images, division.heldout_images)
    assert not {e["id"] for e in train} & {e["id"] for e in heldout}


@pytest.mark.parametrize(
    "size,teacher,requested,fields",
    [
        ("S/16", 224, None, {"size": "S/16", "image_size": 224}),
        ("B/16", 336, None, {"size": "B/16", "image_size": 224}),
        ("B/16", 224, 384, {"size": "B/16", "image_size": 384}),
        ("L/14", 224, None, {"size": "L/14", "image_size": 224}),
        ("L/16", 224, None, {"size": "L/16", "image_size": 224}),
        ("H/14", 378, None, {"size": "H/14", "image_size": 224}),
        ("B/32", 224, None, {"size": "B/16", "patch": 32, "image_size": 256}),
        ("Ti/8", 32, None, {"size": "Ti/16", "patch": 8, "image_size": 32}),
        ("Ti/16", 16, None, {"size": "Ti/16", "image_size": 32}),
    ],
)
def test_sizes(size, teacher, requested, fields):
    options = pretrain_setup.Options("x", "y", size=size, image_size=requested)
    own = pretrain_setup.model_fields(options, teacher)
    assert {k: v for k, v in own.items() if not k.startswith("decoder")} == fields


def test_initial_weights_set_what_must_agree(folder, probe, ran, capsys):
    own = {"width": 192, "depth": 12, "heads": 3, "patch": 4, "mlp_ratio": 4.0, "eps": 1e-12}
    own |= {"activation": "gelu", "positions": "learned"}
    probe["init"] = {"weights": "W", "model": own, "mean": [0.5] * 3, "std": [0.25] * 3}
    call(folder, init=str(folder / "clip"))
    out = capsys.readouterr().out
    for flag in ("init.weights=W", "model.positions=learned", "model.eps=1e-12",
                 "data.mean=0.5,0.5,0.5", "data.std=0.25,0.25,0.25"):  # fmt: skip
        assert f"--config.{flag}" in out
    assert "model.activation" not in out
    own["width"] = 384
    with pytest.raises(UserError, match="width 384.*--size"):
        dgpt_jax.pretrain(folder / "photos", folder / "clip", folder / "b", size="Ti/4", init="W")


def test_the_probe(tmp_path):
    data.random_teacher(tmp_path)
    answer = machine_probe.run(str(tmp_path))
    assert answer["teacher"] == TEACHER | {"weights": str(tmp_path)} and answer["init"] is None
    assert answer["devices"]["platform"] == "cpu" and 0 < answer["devices"]["memory"] <= 16e9


def test_a_name_on_the_hub_without_a_network(folder):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    words = ["-m", "dgpt_jax", "pretrain", folder / "photos", "--teacher=hf:a/b"]
    ended = subprocess.run(
        [sys.executable, *words, f"--out={folder / 'out'}"],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: hf:a/b")


def test_importing_the_package_stays_light():
    code = "import dgpt_jax, sys; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert "pretrain" in dgpt_jax.__all__ and dgpt_jax.pretrain is pretrain.pretrain
