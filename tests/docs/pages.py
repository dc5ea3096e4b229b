"""Commands of the documentation: fenced blocks of its pages, and what their sections need.

A section whose first paragraph starts with "Needs " is not run, nor are its subsections; at the top
of a page the paragraph holds for the whole page.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT, documentation

COMMANDS = ("bash", "python")  # languages of blocks that a reader runs
OUTPUT = ("text", "json", "yaml")
_BLOCK = re.compile(
    r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$"
    r"|^(?P<level>#+) (?P<title>[^\n]+)"
    r"|^(?P<paragraph>(?!```|#)\S[^\n]*(?:\n(?!```|#)[^\n]+)*)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Command:
    """A shell command or a Python block, and the section that shows it."""

    page: str  # relative to the repository
    section: str
    text: str
    needs: str = ""  # the paragraph "Needs …" that holds for it

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def pages() -> list[Path]:
    return [*documentation(), ROOT / "CONTRIBUTING.md"]


def all_commands() -> list[Command]:
    """Returns the commands of all pages in the order of the site's navigation."""
    return [
        command
        for page in pages()
        for command in commands(str(page.relative_to(ROOT)), page.read_text())
    ]


def commands(page: str, text: str) -> list[Command]:
    result, section = [], ""
    needs: dict[int, str] = {}  # by level of heading
    after_heading = False
    for match in _BLOCK.finditer(text):
        if match["level"]:
            section, level = match["title"], len(match["level"])
            needs = {key: value for key, value in needs.items() if key < level} | {level: ""}
            after_heading = True
            continue
        if match["paragraph"] and after_heading and match["paragraph"].startswith("Needs "):
            needs[max(needs)] = match["paragraph"]
        after_heading = False
        if match["language"] in COMMANDS:
            marker = "\n".join(filter(None, needs.values()))
            texts = _split(match["language"], match["code"])
            result += [Command(page, section, command, marker) for command in texts]
    return result


def blocks(text: str) -> list[tuple[str, str]]:
    """Returns (language, code) of the fenced blocks of a page."""
    return [(m["language"], m["code"]) for m in _BLOCK.finditer(text) if m["code"] is not None]


def _split(language: str, code: str) -> Iterator[str]:
    """Yields a Python block, or the commands of a shell block; comments are left out."""
    if language == "python":
        yield code
        return
    lines = iter(code.splitlines())
    for line in lines:
        if line.strip() and not line.startswith("#"):
            yield _join_continued(line, lines)


def _join_continued(line: str, lines: Iterator[str]) -> str:
    """Joins a line with those that continue it after a backslash or within quotes."""
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


def bad_blocks(text: str) -> list[str]:
    """Returns lines of a page that show commands but are not collected.

    These are indented blocks and fences, fences without a known language, and commands within
    output.
    """
    bad = [code for language, code in blocks(text) if language not in COMMANDS + OUTPUT]
    for language, code in blocks(text):
        if language in OUTPUT:
            bad += re.findall(
                r"^(?:\$ |dgpt |python |pip |tools/|gcloud |import ).*", code, re.MULTILINE
            )
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    bad += re.findall(r"^ +```.*", text, re.MULTILINE)
    before = ""  # the last line that is neither blank nor indented
    for blank, line in zip(["", *outside.splitlines()], outside.splitlines(), strict=False):
        indented = line.startswith("    ") and not blank.strip()
        if indented and not re.match(r"[-*+] |\d+\. |!!! |\?\?\?|=== |::: ", before):
            bad.append(line)
        if line.strip() and not line.startswith(" "):
            before = line
    return bad
