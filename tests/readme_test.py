"""What the README promises is there."""

import re

from tests.processes import ROOT


def test_every_fault_names_a_test_that_exists():
    text = (ROOT / "README.md").read_text()
    table = text.partition("| fault | what happens | test |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[1:]]
    assert len(rows) > 20 and all(len(row) == 3 for row in rows)
    for fault, _, tests in rows:
        named = re.findall(r"`(\w+_test)`", tests)
        assert named, fault
        for name in named:
            assert "def test_" in (ROOT / f"tests/{name}.py").read_text(), fault
