"""The wheel, installed outside of the repository: its content, and the commands from images to an
evaluated encoder."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from dgpt_jax import _version, invocation
from tests.support import data
from tests.support.paths import ROOT
from tests.support.processes import QUICK_COMPILE

pytestmark = pytest.mark.slow

SOURCES = ("dgpt_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# README.md, "Your own images", by the names of the installed commands.
OWN_IMAGES = (
    "import SRC --out=IMAGES",
    "tokens --config=tokens_in1k_openclip_h14 --out=TOKENS --config.source=IMAGES "
    "--config.teacher.weights=CLIP_DIR --config.views=4 --smoke",
    "verify TOKENS --weights=CLIP_DIR",
    "train --config=pretrain_b16_in1k --workdir=RUN --config.data.path=TOKENS "
    "--config.data.examples=None --config.teacher.width=None --config.teacher.grid=None "
    "--config.batch_size=256 '--config.total=100 epochs' --smoke",
    "plot RUN --out=curves.png",
    "report RUN --out=run.html",
    "visualize RUN SRC/val --out=tokens.png",
    "convert RUN EXPORT --to=timm",
    "evaluate --config=knn_in1k --checkpoint=RUN --config.data=IMAGES --config.test=val --smoke",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the repository gets no build directory, and none is reused."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    words = ("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", f"-w{out}")
    pip(*words)
    (path,) = out.glob("*.whl")
    return path


def pip(*words):
    subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """A function that runs `dgpt WORDS` of the installed wheel, in an empty directory, with the
    other packages of this environment, and returns its output."""
    root = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
    python = root / "env/bin/python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    paths = {"base": str(root / "env"), "platbase": str(root / "env")}
    site_packages = Path(sysconfig.get_path("purelib", vars=paths))
    # Of a directory named in a .pth file no other .pth file is read, such as an editable install.
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (root / "home").mkdir()
    environment = {
        "PATH": f"{root / 'env/bin'}{os.pathsep}{os.defpath}",
        "HOME": str(root / "home"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_COMPILE,
    }

    def run(*words) -> str:
        ended = subprocess.run(
            list(map(str, words)), cwd=root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert ended.returncode == 0, f"{words}\n{ended.stdout}"
        return ended.stdout

    file = run(python, "-c", "import dgpt_jax; print(dgpt_jax.__file__)").strip()
    assert Path(file) == site_packages / "dgpt_jax/__init__.py"
    return run, root


def test_the_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dgpt_jax/py.typed", "dgpt_jax/evals/published.csv"} <= set(names)
    for folder, packaged in (("configs", "dgpt_jax/configs"), ("dgpt_jax", "dgpt_jax")):
        files = {
            f"{packaged}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")
        }
        assert files <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"dgpt_jax", f"dgpt_jax-{_version.__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
    assert b"\ndgpt = dgpt_jax.__main__:main\n" in zipfile.ZipFile(wheel).read(entry_points)


def test_own_images(installed):
    run, root = installed
    tower = dataclasses.replace(data.TOWER, image_size=224, patch=56)
    data.random_teacher(root / "CLIP_DIR", tower=tower)
    for seed, split in enumerate(("train", "val")):
        data.write_folder(root / "SRC", 10, split=split, seed=seed)
    for words in OWN_IMAGES:
        before = os.times()
        output = run("sh", "-c", f"exec dgpt {words}")
        last = output.strip().splitlines()[-1]
        after = os.times()
        seconds = sum(after[2:4]) - sum(before[2:4])  # CPU time of children
        print(f"{after.elapsed - before.elapsed:4.0f} s, CPU {seconds:4.0f} s: {words}\n  {last}")
        assert "next: " in last
        named = re.findall(r"dgpt ([a-z]+)", last)
        assert set(named) <= set(invocation.COMMANDS)
        assert not re.search(r"tools/|python -m dgpt_jax|configs/\w", output), output
    for name in ("curves.png", "run.html", "tokens.png", "EXPORT/model.safetensors"):
        assert (root / name).stat().st_size > 1000


def test_pretrain_from_the_wheel(installed):
    run, root = installed
    tower = dataclasses.replace(data.TOWER, image_size=32, patch=8)
    (root / "clip").mkdir()
    data.random_teacher(root / "clip", tower=tower)
    data.write_folder(root / "photos", 40, split="", seed=2)
    output = run(
        "dgpt", "pretrain", "photos", "--teacher=clip", "--out=PRETRAINED", "--size=Ti/8",
        "--epochs=2", "--views=1",
    )  # fmt: skip
    assert output.strip().splitlines()[-1].startswith("next: ")
    assert not re.search(r"tools/|python -m dgpt_jax|configs/\w", output), output
    for name in ("timm/model.safetensors", "report/index.html"):
        assert (root / "PRETRAINED" / name).stat().st_size > 1000


def test_other_forms(installed):
    run, _ = installed
    assert run("dgpt") == run("dgpt", "help")
    assert run("python", "-m", "dgpt_jax", "--version") == f"dgpt_jax {_version.__version__}\n"
    listing = run("dgpt", "evaluate", "--config=list")
    assert "\nknn_in1k " in listing and "site-packages/dgpt_jax/configs\n" in listing
    # A typical copy from the documentation, which is written for a clone.
    shown = run("sh", "-c", "dgpt train --config=configs/quickstart.py --print_config; test $? = 1")
    assert shown == "error: no such config file: configs/quickstart.py: did you mean quickstart?\n"
    assert "tools/setup_venv" not in run("sh", "-c", "dgpt doctor || true")
