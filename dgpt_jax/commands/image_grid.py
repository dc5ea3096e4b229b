"""A figure of titled rows of images, drawn with Matplotlib."""

from collections.abc import Mapping, Sequence

import numpy as np

from dgpt_jax.commands.plot import Output, plt, save

COLUMNS = 12  # images per line


def grid(
    rows: Mapping[str, np.ndarray],
    out: Output,
    captions: Mapping[str, Sequence[str]] | None = None,
):
    """Draws one titled row of images (B, height, width, 3) for each entry, with its captions, if
    any, above the images. More than COLUMNS images continue below all rows."""
    captions = captions or {}
    longest = max(map(len, rows.values()))
    lines = [
        (title, images[start : start + COLUMNS], captions.get(title, ())[start : start + COLUMNS])
        for start in range(0, longest, COLUMNS)
        for title, images in rows.items()
        if start < len(images)
    ]
    columns = min(longest, COLUMNS)
    margin, height = 1.6, 1.4 if captions else 1.15
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(1.1 * columns + margin, height * len(lines) + 0.1),
        squeeze=False,
    )  # fmt: skip
    for line, (title, images, texts) in zip(axes, lines, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
        for axis, caption in zip(line, texts, strict=False):
            axis.set_title(caption, fontsize=6, pad=2)
        for axis in line:
            axis.set_axis_off()
        line[0].text(
            -0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    figure.subplots_adjust(
        left=(margin - 0.1) / (1.1 * columns + margin),
        right=0.99,
        bottom=0.01,
        top=1 - 0.2 / (height * len(lines)) if captions else 0.98,
        hspace=0.22 if captions else 0.05,
    )
    save(figure, out, dpi=160 if captions else 130)
