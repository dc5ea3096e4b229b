"""Tables and figures of the results are those of docs/results/data."""

import re
from pathlib import Path

import pytest
from PIL import Image

from dgpt_jax.errors import UserError
from tests.support.paths import ROOT
from tools.studies import figures, result_tables

PAGES = sorted((ROOT / "docs/results").glob("*.md"))
DATA = sorted(result_tables.DATA.glob("*.csv"))
# First columns of tables without measurements.
WORDS = ("page", "", "question")
# Figures that show what a command writes.
PICTURES = {"report.png", "quickstart.png"}


def tables(text: str) -> list[str]:
    return [table.strip() for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)]


def first_column(table: str) -> str:
    return table.removeprefix("|").partition("|")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_equal_the_data(page):
    text = page.read_text()
    linked = set(re.findall(r"\]\(data/(\w+\.csv)\)", text))
    assert linked <= {path.name for path in DATA}
    expected = [x for path in DATA if path.name in linked for x in result_tables.tables(path)]
    shown = [table for table in tables(text) if first_column(table) not in WORDS]
    wrong = [table for table in shown if table not in expected]
    missing = [table for table in expected if table not in shown]
    assert not wrong + missing, "\n\n".join(["of no data:", *wrong, "not shown:", *missing])
    assert len(re.findall("^Metadata: ", text, flags=re.MULTILINE)) >= bool(shown)


def test_all_data_are_shown():
    text = "".join(page.read_text() for page in PAGES)
    assert len(DATA) > 20
    assert [path.name for path in DATA if f"](data/{path.name})" not in text] == []


def test_every_figure_has_data(tmp_path):
    sources = figures.sources(result_tables.DATA)
    assert set(sources) == {path.name for path in (ROOT / "docs/figures").glob("*.png")} - PICTURES
    for name in ("study_views.png", "weak_b16.png"):  # one of each kind
        draw, path = sources[name]
        draw(path, tmp_path / name)
        assert min(Image.open(tmp_path / name).size) > 200


def test_a_study_is_written_as_it_is_read(tmp_path):
    path = result_tables.DATA / "decoder_size.csv"
    accuracies, differences, baseline = result_tables.study(path)
    assert baseline == "depth 2, width 64" and baseline not in differences
    result_tables.write_study(tmp_path / "x.csv", accuracies, differences)
    assert result_tables.tables(tmp_path / "x.csv") == result_tables.tables(path)


def test_thousands_are_grouped(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("what,MB\nB/16 1000,12345\ny,0.5\n")
    (table,) = result_tables.tables(path)
    assert table.splitlines()[2:] == ["| B/16 1000 | 12,345 |", "| y | 0.5 |"]


def test_lines_of_different_length_are_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("what,MB\nx\n")
    with pytest.raises(UserError, match="x.csv: lines have different numbers of cells"):
        result_tables.tables(path)
