"""The shell scripts of the documentation, with stand-ins for Python and what it would install."""

import re
import shutil

import pytest

from tests.docs.pages import all_commands
from tests.docs.selection import STAND_IN, Skeleton
from tests.support.paths import ROOT

# A Python that creates virtual environments with itself in them.
PYTHON = (
    STAND_IN + '[ "$1 $2" != "-m venv" ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }\n'
)


def documented(script: str) -> list[list[str]]:
    """Returns the arguments that pages give to a script, each once."""
    commands = [c.words for c in all_commands() if c.text.startswith(script)]
    arguments = [words[1 : words.index("&&") if "&&" in words else None] for words in commands]
    return [list(words) for words in dict.fromkeys(map(tuple, arguments))]


def test_the_environment(tmp_path):
    """Documented extras are installed at the tested versions; nothing is done twice."""
    tree = Skeleton(tmp_path, ["tools/setup_venv.sh", "setup.py", "constraints.txt"])
    shutil.rmtree(tmp_path / ".venv")
    python = tmp_path / "bin/python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    known = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert len(documented("tools/setup_venv.sh")) > 3
    for (extras,) in documented("tools/setup_venv.sh"):
        assert set(extras.split(",")) <= set(known)
        calls = tree.run("tools/setup_venv.sh", extras)
        line = " ".join(calls[-1])
        assert "-c constraints.txt" in line and f" -e .[{extras}]" in line
        assert calls[-1][0].endswith(".venv/bin/python")
        again = tree.run("tools/setup_venv.sh", extras)
        assert not [call for call in again if "pip" in call]
    (tmp_path / "constraints.txt").write_text("jax==1\n")
    assert "pip" in tree.run("tools/setup_venv.sh", extras)[-1]


@pytest.mark.parametrize("words", documented("tools/quickstart.sh"), ids=" ".join)
def test_the_quickstart(tmp_path, words):
    tree = Skeleton(tmp_path, ["tools/quickstart.sh"])
    setup, run = tree.run("tools/quickstart.sh", *words)
    assert setup[1:] == ["quickstart"]
    assert run[0].endswith(".venv/bin/python")
    assert run[1:] == ["tools/quickstart.py", *words]


@pytest.mark.parametrize("words", documented("tools/test.sh"), ids=" ".join)
def test_the_tests(tmp_path, words):
    """Linters and types come first."""
    setup, *linters, run = Skeleton(tmp_path).run("tools/test.sh", *words)
    assert setup[1:] == ["test,lint"]
    programs = [call[0].rpartition("/")[2] for call in linters]
    assert programs == ["ruff", "ruff", "lint-imports", "basedpyright"]
    assert run[1:3] == ["-m", "pytest"] and run[len(run) - len(words) :] == words
