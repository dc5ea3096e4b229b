"""Lines about a finished `pretrain`: what its commands measured and checked."""

import json
from collections.abc import Iterator
from pathlib import Path

from dgpt_jax.monitoring import metrics_log

GROUPS = ("heldout/", "rank/", "agreement/")
K = 20  # neighbors of the kNN that is shown


def lines(out: Path) -> Iterator[str]:
    """Yields the last numbers of held-out images, kNN accuracy, and the check of the export."""
    log = metrics_log.read(out / "run")
    last = {name: curve.values[-1] for name, curve in log.curves.items() if name.startswith(GROUPS)}
    yield "held-out images: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    for path in sorted((out / "run").glob("results_step*.json")):
        rows = [row for row in json.loads(path.read_text())["results"] if row.get("k") == K]
        if rows:
            cells = ", ".join(f"{row['features']} {row['accuracy']:.1f} %" for row in rows)
            yield f"kNN, {K} neighbors, {rows[0]['test']} held-out images: {cells}"
    text = (out / "logs/export.txt").read_text()
    yield from (f"timm export: {line}" for line in text.splitlines() if "verified: " in line)
