"""Commands of a page are collected with what their sections need; no block is left out."""

import pytest

from tests.docs.pages import bad_blocks, commands, pages
from tests.docs.readme_test import elsewhere, is_run
from tests.support.paths import ROOT


def test_every_block_is_collected():
    assert {*(ROOT / "docs").rglob("*.md")} <= {*pages()}, "a page is not in the navigation"
    for page in pages():
        assert not bad_blocks(page.read_text()), page


PAGE = """# Page

## New
```bash
# a comment
dgpt unheard_of
rm -rf /
```

## Hardware

Needs a TPU:
two of them.

```bash
tools/y.sh a \\
    b
```

### Below

```python
import dgpt_jax
x = 1
```

## Text

It Needs no line in its midst:
Needs nothing.

```bash
echo "a
b"
```
"""


def test_markers_and_commands_without_a_test():
    first, second, third, fourth, fifth = commands("page.md", PAGE)
    assert is_run(first) and not is_run(second)
    assert not second.needs and not elsewhere(second) and not fifth.needs
    assert third.words == ["tools/y.sh", "a", "b"] and third.needs == "Needs a TPU:\ntwo of them."
    assert fourth.needs and fourth.section == "Below" and fourth.text == "import dgpt_jax\nx = 1\n"
    assert fifth.words == ["echo", "a b"]
    marked = commands("page.md", PAGE.replace("# Page\n", "# Page\n\nNeeds a disk.\n", 1))
    assert len(marked) == 5 and all("Needs a disk." in command.needs for command in marked)


@pytest.mark.parametrize(
    "block",
    ["Text:\n\n    python x.py\n", "```\nx\n```\n", "```text\npython x.py\n```\n",
     "```sh\nx\n```\n", "- a\n\n  ```bash\n  x\n  ```\n"],
)  # fmt: skip
def test_blocks_that_would_not_be_collected(block):
    assert bad_blocks(PAGE + "\n" + block) and not bad_blocks(PAGE)
    assert not bad_blocks("- a list\n\n    its second paragraph\n\n```text\n1 %\n```\n")
