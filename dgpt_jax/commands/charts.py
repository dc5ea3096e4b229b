"""Charts and tables of results: accuracies, differences, and images/s by the number of chips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.commands.plot import MaxNLocator, Output, plt, save
from dgpt_jax.monitoring import markdown

PANELS = 3  # of differences, side by side
# {row: {(protocol, labels per class): (mean, standard error)}}, in percent
Cells = Mapping[str, Mapping[tuple, tuple[float, float]]]


def table(cells: Cells) -> str:
    """Markdown table of the means."""
    columns = list(next(iter(cells.values())))
    titles = [f"{protocol} {shots}" for protocol, shots in columns]
    rows = ([name, *(f"{row[c][0]:.1f}" for c in columns)] for name, row in cells.items())
    return markdown.table(("features", *titles), rows)


def accuracies(cells: Cells, out: Output, **options: Any):
    """Bar chart of the means with standard errors, one panel per protocol; `options` are those of
    savefig."""
    columns = list(next(iter(cells.values())))
    protocols = list(dict.fromkeys(protocol for protocol, _ in columns))
    figure, axes = plt.subplots(1, len(protocols), figsize=(11, 4), sharey=True, squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        shots = [s for p, s in columns if p == protocol]
        for i, shot in enumerate(shots):
            x = [row + 0.27 * (i - (len(shots) - 1) / 2) for row in range(len(cells))]
            means, errors = zip(*(row[protocol, shot] for row in cells.values()), strict=True)
            label = "all labels" if shot == "all" else f"{shot} labels per class"
            axis.bar(x, means, 0.25, yerr=errors, ecolor="grey", label=label)
        axis.set_xticks(range(len(cells)), list(cells), rotation=30, ha="right", fontsize=8)
        axis.set_title(protocol)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("accuracy, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(shots))
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    save(figure, out, **options)


def differences(
    cells: Mapping[str, Mapping[str, tuple[float, float]]], out: Path | str, title: str
):
    """Dots with error bars, one panel per column and one line per row.

    cells: {row: {"PROTOCOL SHOTS": (mean, half width of the interval)}}
    """
    columns, rows = list(next(iter(cells.values()))), list(cells)
    across = min(PANELS, len(columns))
    down = -(-len(columns) // across)
    size = (2.4 * across + 2, (0.3 * len(rows) + 1.1) * down + 0.5)
    figure, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=False):
        means, halves = np.array([cells[row][column] for row in rows]).T
        axis.axvline(0, color="grey", linewidth=1)
        axis.errorbar(means, range(len(rows)), xerr=np.nan_to_num(halves), fmt="o", capsize=3)
        axis.set_title(column, fontsize=10)
        axis.set_yticks(range(len(rows)), rows)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.margins(y=0.5 / len(rows))
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(columns) :]:
        axis.set_axis_off()
    axes[0, 0].invert_yaxis()
    figure.supxlabel("points", fontsize=10)
    figure.suptitle(f"{title} (mean and 95 % interval, paired by seed)", fontsize=10)
    figure.tight_layout()
    save(figure, out)


def scaling(
    chip_counts: Sequence[int], rates: Mapping[str, Sequence[float]], out: Path | str, title: str
):
    """One line per entry of rates: images/s per chip against the number of chips."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for label, values in rates.items():
        axis.plot(chip_counts, values, marker="o", label=label)
    axis.set(xscale="log", xlabel="chips", ylabel="images/s per chip, at most", title=title)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_xticks(chip_counts, [str(n) for n in chip_counts])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    save(figure, out)
