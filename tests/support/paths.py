"""Paths of the repository and of pinned numbers."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"


def documentation() -> list[Path]:
    """Returns README.md and the pages of docs/ in the order of the site's navigation."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        items = entry if isinstance(entry, list) else entry.values()
        return [page for item in items for page in pages(item)]

    files = [ROOT / "docs" / page for page in pages(navigation)]
    return [ROOT / "README.md", *(file for file in files if file.exists())]  # some are generated
