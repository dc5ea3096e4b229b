"""Links of the documentation exist; its tables match the source and the tests."""

import re
import xml.etree.ElementTree

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


def test_every_fault_names_a_test_that_exists():
    rows = _rows("| fault | what happens | test |")
    assert len(rows) > 20 and all(len(row) == 3 for row in rows)
    for fault, _, tests in rows:
        names = re.findall(r"`(\w+_test)`", tests)
        assert names, fault
        for name in names:
            files = [*ROOT.glob(f"tests/**/{name}.py")]
            assert files and all("def test_" in f.read_text() for f in files), fault
