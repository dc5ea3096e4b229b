"""Published results, in percent, that report.py tabulates beside ours (published.csv).

Tables: "finetuned", top-1 at 224 pixels by model size, also of supervised training; "robustness" of
fine-tuned weights; "frozen" features by kNN (k = 20, T = 0.07, unless the source says otherwise),
linear and attentive probe; all on ImageNet-1K. An empty cell was not published or could not be
checked. Column C is an error: in the paper's Table 2 very likely
the plain mean error, for MAE's own normalized mCE is 51.7 (B) and 41.8 (L).

Sources: "paper" is arXiv 2312.02147; "timm" its results/*.csv; else the method's own paper or its
repository's README.
"""

import csv
from importlib import resources

SIZES = ("S", "B", "L", "H")
ROBUSTNESS_COLUMNS = ("IN", "V2", "ReaL", "A", "R", "C", "Sketch", "Hard")
FROZEN_COLUMNS = ("kNN", "linear", "attentive")


def rows(table: str, columns: tuple[str, ...]) -> list[list[str]]:
    """Cells of these columns for each row of a table, in the order of the file."""
    text = resources.files("dgpt_jax.evals").joinpath("published.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(text.splitlines())
    return [[line[c] for c in columns] for line in lines if line["table"] == table]
