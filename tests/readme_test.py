"""What the README promises is there, and its commands do what they say."""

import dataclasses
import importlib
import re
import shlex
import shutil
import sys
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli, signals
from tests import data
from tests.paths import GOLDEN
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
STARTS = ("python ", "tools/", "git ", "gcloud ", "pip ", "POD=", "EXTRAS=", "import ")
# Commands that are not run here: the file that runs them, and what is to be found there.
ELSEWHERE = {
    "tools/quickstart.sh": (".ci/run", "tools/quickstart.sh"),
    "tools/test.sh": (".ci/run", "tools/test.sh"),
    "tools/setup_venv.sh": (".ci/run", "tools/setup_venv.sh"),
    "git clone": (".ci/run", ""),  # what stands here is a clone
    "python tools/bench.py": ("tests/bench_test.py", "bench_peer.beside("),  # compiles for minutes
    "python tools/plan.py": ("tests/plan_test.py", "tools/plan.py"),
    "python tools/ablate.py": ("tests/ablate_test.py", "tools/ablate.py"),  # trains for an hour
    "python -m dgpt_jax.evaluate --config=configs/robustness_in1k.py": (
        "tests/imagenet_sets.py",
        "robustness.evaluate(",
    ),
    "import torch": ("tests/checkpoint_tool_test.py", "def test_the_onnx_recipe"),
}
# What a command gets besides, later flags taking the place of earlier ones.
ADDED = {
    "python tools/bench_input.py": "--examples=32 --seconds=0.1",
    "python tools/bench_tokens.py": "--teacher=B/16 --examples=8 --batch_size=4 --seconds=0.1",
    "python tools/convert.py D-iGPT_B_PT_1K.pth": "--heads=3 --decoder_heads=2",
    "python -m dgpt_jax.train --config=configs/quickstart_finetune.py:attentive": (
        "--config.classify.num_classes=1000 --config.model.patch=16 --config.model.image_size=224 "
        "--config.evals.heldout_split=validation --config.classify.resize=256"
    ),
}
# Words that a small run has otherwise.
OTHERWISE = {
    "--last=3": "--last=2",
    "--last=9": "--last=2",
    "RUN/results_step93835.json": "RUN/results_step4.json",
    "--config.resize=32": "--config.resize=256",
    "[--untrained=0]": "--untrained=0",
}
PLACES = "SRC IMAGES CLIP_DIR TOKENS RUN OTHER_RUN EXPORT EXPORT_HF PHOTOS TUNED DIR MEAN EMA"


@dataclass(frozen=True)
class Command:
    """An indented command (or a Python block) and the section that it stands in."""

    section: str
    text: str
    needs: bool  # whether the section says that it needs something

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def elsewhere(self) -> tuple[str, str] | None:
        found = [where for start, where in ELSEWHERE.items() if self.text.startswith(start)]
        return found[0] if found else None


def commands(text: str = README) -> list[Command]:
    found = []
    for part in re.split(r"^(?=##+ )", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        needs = re.search(r"^Needs ", body, re.MULTILINE) is not None
        for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", body, re.MULTILINE):
            lines = iter(re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n").splitlines())
            for line in lines:
                if line.startswith("import "):
                    line = "\n".join([line, *lines])
                elif not line.startswith(STARTS):
                    continue
                else:
                    line = _whole(line, lines)
                found.append(Command(title.lstrip("# "), line, needs))
    return found


def _whole(line: str, lines) -> str:
    """With the lines that a backslash or an open quote takes in."""
    while True:
        if line.endswith("\\"):
            line = f"{line[:-1]} {next(lines).strip()}"
            continue
        try:
            shlex.split(line, comments=True)
        except ValueError:
            line = f"{line} {next(lines).strip()}"
        else:
            return line


def test_every_command_is_run_or_needs_hardware():
    found = commands()
    assert len(found) > 50
    run = [one for one in found if _is_run(one)]
    assert len(run) > 25
    for one in found:
        if not _is_run(one) and not one.needs:
            where = one.elsewhere()
            assert where, f"neither run by a test nor marked by 'Needs …': {one.text}"
            assert where[1] in (ROOT / where[0]).read_text(), one.text


def test_a_command_without_a_test_is_found():
    text = (
        "## New\n\n    python tools/unheard_of.py\n    rm -rf /\n\n    tools/y.sh a \\\n      b\n"
    )
    one, other = commands(text)
    assert _is_run(one) and not other.needs and not _is_run(other) and other.elsewhere() is None
    assert other.words == ["tools/y.sh", "a", "b"]
    assert all(one.needs for one in commands(text + "\nNeeds a TPU.\n"))


def _is_run(one: Command) -> bool:
    """Whether test_the_commands runs it."""
    ours = one.text.startswith(("python tools/", "python -m dgpt_jax.", "import dgpt_jax"))
    return ours and not one.needs and one.elsewhere() is None


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch):
    """All that need no hardware, in their order, each on what those before it have made. What takes
    --config is rehearsed by --smoke."""
    monkeypatch.setattr(signals, "raise_on_sigterm", lambda: None)
    monkeypatch.chdir(tmp_path)
    places = {}
    for one in filter(_is_run, commands()):
        if one.section in ("Your own images, in ten lines", "From images to an encoder"):
            places = _begin(tmp_path / one.section.split()[0], places)
        _prepare(places, one)
        print(f"{one.section}: {one.text}")
        if one.text.startswith("import"):
            _run_python(one.text, places)
        else:
            _run(monkeypatch, one, places)
    for name in ("tokens.png", "attention.png", "neighbours.png", "predictions.png", "curves.png"):
        assert Image.open(tmp_path / name).size[0] > 200
    assert "data:image" in (tmp_path / "run.html").read_text()


def _begin(root, places: dict) -> dict:
    """Where the placeholders of a section are, with images and a teacher."""
    if root.exists():
        return places
    places = {name: root / name for name in PLACES.split()}
    own = root.name == "Your"
    splits = ("train", "val") if own else ("train", "validation")
    for seed, split in enumerate(splits):  # the recipes that follow are for ImageNet's 1000
        classes = "ab" if own else [f"{i:03d}" for i in range(1000)]
        per_class = 10 if own else 1
        data.write_folder(places["SRC"], per_class, classes=classes, split=split, seed=seed)
    data.write_folder(places["PHOTOS"], 3)
    tower = dataclasses.replace(data.TOWER, image_size=224, patch=56)
    data.random_teacher(places["CLIP_DIR"], tower=tower)
    return places


def _prepare(places: dict, one: Command):
    """What a command finds there beside what others have made."""
    if "OTHER_RUN" in one.text and not places["OTHER_RUN"].exists():
        shutil.copytree(places["RUN"], places["OTHER_RUN"])
    if "DIR/runs/both" in one.text and not (places["DIR"] / "runs").exists():
        shutil.copytree(places["RUN"], places["DIR"] / "runs/both")
        shutil.copytree(places["IMAGES"], places["DIR"] / "images")
    if "D-iGPT_B_PT_1K.pth" in one.text:
        shutil.copy(GOLDEN / "digpt_tiny.pth", "D-iGPT_B_PT_1K.pth")
        shutil.rmtree(places["DIR"], ignore_errors=True)
    if "convert.py" in one.text:  # which writes over nothing
        for name in ("EXPORT_HF", "EXPORT"):
            if name in one.words:
                shutil.rmtree(places[name], ignore_errors=True)


def _placed(text: str, places: dict) -> str:
    for name in sorted(places, key=len, reverse=True):
        text = re.sub(rf"(?<![\w/]){name}(?!\w)", str(places[name]), text)
    return text


def _run(monkeypatch, one: Command, places: dict):
    """A command in this process."""
    words = [OTHERWISE.get(word, word) for word in one.words[1:]]
    for start, more in ADDED.items():
        words += more.split() if one.text.startswith(f"{start} ") else ()
    if "--keys" in words:
        words = [word.replace("SRC", "EXPORT") for word in words]
    words = [
        _placed(re.sub(r"(?<=--config=)configs", str(ROOT / "configs"), w), places) for w in words
    ]
    if any(word.startswith("--config=") for word in words):
        words.append("--smoke")
    script = words.pop(0)
    module = words.pop(0) if script == "-m" else Path(script).stem
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        cli.run(main)
    except SystemExit as ended:
        assert not ended.code, (one.text, ended.code)


def _run_python(text: str, places: dict):
    """A block of Python, given what it leaves to the reader."""
    rng = np.random.default_rng(0)
    given = {
        "pictures": rng.integers(0, 256, (2, 224, 224, 3), np.uint8),
        "images": jnp.zeros((2, 224, 224, 3)),
        "tokens": jnp.asarray(rng.standard_normal((2, 17, 24)), jnp.float32),
        "orders": jnp.asarray([[0, 1, 2, 3], [3, 1, 0, 2]]),
    }
    exec(compile(_placed(text, places), "README.md", "exec"), given)
    assert given["features"].shape == (2, 32) and set(given["losses"]) == {"next", "visible"}


def test_links_and_figures():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / link).exists(), link
    figure = xml.etree.ElementTree.parse(ROOT / "docs/flow.svg").getroot()
    told = " ".join(figure.itertext())
    for command in re.findall(r'class="cmd"[^>]*>([^<]+)<', (ROOT / "docs/flow.svg").read_text()):
        for name in command.replace("dgpt_jax.", "").split(", "):
            assert name in told
            assert any((ROOT / folder / f"{name}.py").exists() for folder in ("tools", "dgpt_jax"))


def test_what_a_symptom_quotes_is_said_somewhere():
    files = [*(ROOT / "dgpt_jax").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    said = "".join(path.read_text() for path in files)
    said = re.sub(r'"\s*\n\s*f?"', "", said)  # lines that are cut in two
    rows = _rows("| symptom | cause, and what to do |")
    assert len(rows) > 10
    for symptom, _ in rows:
        for quoted in re.findall(r"`([^`]{12,})`", symptom):
            for part in re.split(r"…|\d+", quoted):
                if len(part.strip()) > 5:
                    assert part.strip() in said, quoted


def test_the_house_has_all_its_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)/?`", text)
    there = [
        p.stem for p in (ROOT / "dgpt_jax").iterdir() if (p / "__init__.py").exists() or p.suffix
    ]
    assert sorted(named) == sorted({*there} - {"__init__"})


def _rows(head: str) -> list[list[str]]:
    """The rows of a table by its first line."""
    table = README.partition(head)[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.strip().splitlines()[1:]]


def test_every_fault_names_a_test_that_exists():
    rows = _rows("| fault | what happens | test |")
    assert len(rows) > 20 and all(len(row) == 3 for row in rows)
    for fault, _, tests in rows:
        named = re.findall(r"`(\w+_test)`", tests)
        assert named, fault
        for name in named:
            assert "def test_" in (ROOT / f"tests/{name}.py").read_text(), fault
