"""Section of tools/report.py: how a run used its wall time."""

from dgpt_jax.monitoring import html
from dgpt_jax.monitoring.progress import duration
from dgpt_jax.monitoring.run_summary import Run


def time_use(run: Run) -> str:
    """Table of the wall time by use, "" without times in the log."""
    total = sum(run.time_use.values())
    rows = [
        (name, html.Number(duration(seconds)), html.Number(html.percent(100 * seconds / total)))
        for name, seconds in run.time_use.items()
        if seconds
    ]
    return html.table(("wall time", "duration", "share"), rows) if rows else ""
