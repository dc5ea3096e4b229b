"""Links of the documentation exist; its tables match the source and the tests."""

import re
import xml.etree.ElementTree

import pytest

from tests.docs import selection
from tests.docs.readme_test import RUN_ELSEWHERE
from tests.support import commands as command_files
from tests.support.paths import ROOT, documentation

DOCS = "\n\n".join(page.read_text() for page in documentation())


def test_links_and_figures():
    for page in (*documentation(), ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
    flow = ROOT / "docs/figures/flow.svg"
    text = " ".join(xml.etree.ElementTree.parse(flow).getroot().itertext())
    for command in re.findall(r'class="cmd"[^>]*>([^<]+)<', flow.read_text()):
        for name in command.replace("dgpt_jax.", "").split(", "):
            assert name in text
            assert name in command_files.FILES


def test_quoted_messages_exist():
    files = [*(ROOT / "dgpt_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    source = "".join(path.read_text() for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # joins string literals of several lines
    source = re.sub(r"\{counted\([^,]+, '([\w ]+)'\)\}", r" \1s", source)
    rows = _rows("| symptom | cause, and what to do |")
    assert len(rows) > 10
    for symptom, _ in rows:
        for quoted in re.findall(r"`([^`]{12,})`", symptom):
            for part in re.split(r"…|\d+", quoted):
                if len(part.strip()) > 5:
                    assert part.strip() in source, quoted


def _rows(head: str) -> list[list[str]]:
    """Rows of the table with this header."""
    table = DOCS.partition(head)[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.strip().splitlines()[1:]]


def named_tests() -> dict[str, str]:
    """{"file_test::test_name": the fault or command that it is named for}."""
    rows = _rows("| fault | what happens | test |")
    assert len(rows) > 20 and all(len(row) == 3 for row in rows)
    result = {}
    for fault, _, cell in rows:
        names = re.findall(r"`(\w+_test::test_\w+)`", cell)
        assert 1 <= len(names) <= 3 and len(names) == cell.count("`") / 2, fault
        result |= dict.fromkeys(names, fault)
    for command, names in RUN_ELSEWHERE.items():
        result |= dict.fromkeys(names, command)
    return result


def test_named_tests_exist():
    assert not selection.undefined(named_tests())
    wrong = ["loop_test::test_absent", "absent_test::test_pods", "loop_test::test_ctrl_c"]
    assert sorted(selection.undefined(wrong)) == sorted(wrong)


@pytest.mark.slow
def test_named_tests_are_run(tmp_path):
    """By tools/test.sh, .ci/run or the weekly workflow. Importing their files takes 20 s."""
    runs = selection.pytest_runs(tmp_path)
    assert {run.source for run in runs} == {*selection.SCRIPTS, selection.WORKFLOW}
    names = named_tests()
    files = {file for name in names for file in selection.files_of(name)}
    collected = selection.collect(runs, sorted(files))
    never = selection.never_run(names, collected)
    assert not never, {name: names[name] for name in never}
    ordinary = selection.Collected(collected.functions[:1], collected.skipped_files)
    assert "kill_test::test_runs_killed_at_random_times_resume" in selection.never_run(
        names, ordinary
    )
