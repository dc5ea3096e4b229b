"""Pages begin with a sentence about their use, and name config keys that exist."""

import re

import pytest

from dgpt_jax.config import EvaluateConfig, TokensConfig, TrainConfig, schema
from dgpt_jax.config.renamed_keys import RENAMED
from tests.support.paths import ROOT, documentation

PAGES = [page for page in documentation() if page.name != "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_begin_with_a_sentence(page):
    title, first, *_ = page.read_text().split("\n\n")
    assert re.fullmatch(r"# [^\n]+", title)
    assert re.match(r"[A-Z][^|]*[a-z)`]\.(\s|$)|[A-Z][^|]+:$", first), first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_have_no_dates(page):
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", page.read_text())


def test_every_page_is_in_the_navigation():
    pages = {path for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(PAGES)


def test_release_notes_name_the_renamed_keys():
    text = (ROOT / "docs/release_notes.md").read_text()
    rows = re.findall(r"^\| `config\.(\S+)` \| `config\.(\S+)` \|$", text, flags=re.MULTILINE)
    assert dict(rows) == RENAMED


def test_config_keys_exist():
    keys = set()
    for config in (TrainConfig, TokensConfig, EvaluateConfig):
        for key in schema.keys(config):
            parts = key.split(".")
            keys |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    files = {"json", "py"}
    for page in documentation():
        named = re.findall(r"(?<![\w./])(?:--)?config\.([a-z]\w*(?:\.[a-z]\w*)*)", page.read_text())
        named = [re.sub(r"^teachers\.\w+", "teachers.NAME", key) for key in named]
        old = set(RENAMED) if page.name == "release_notes.md" else set()
        assert set(named) - keys - files <= old, page
