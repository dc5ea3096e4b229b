"""The quickstart's page: its table, curves and figures, the commands, and what to do next."""

import contextlib
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dgpt_jax import invocation
from dgpt_jax.commands import charts, plot, visualize
from dgpt_jax.commands.image_grid import grid
from dgpt_jax.commands.jobs import Job
from dgpt_jax.data import image_ops
from dgpt_jax.evals.feature_maps import pca_colors
from dgpt_jax.examples import measure
from dgpt_jax.models import teacher_vit
from dgpt_jax.monitoring import html, metrics_log
from dgpt_jax.storage import atomic, tfds_dataset
from dgpt_jax.weights import api, teacher_loading

FILE = "index.html"
RUNS = ("both", "next", "visible", "pixels")
METRICS = ("next", "visible", "heldout/next", "heldout/visible")
EXAMPLES = 10  # in the figure of tokens
# Matplotlib's settings for figures that are legible on a light and on a dark page.
GRAY = "#7d8590"
STYLE: Any = {"savefig.transparent": True, "legend.frameon": False} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GRAY
)
LIMITS = (
    "What the table does not show: the teacher is supervised on the training labels, so the "
    "students benefit from labels indirectly; the images are toys; one seed."
)


def cells(out: Path) -> charts.Cells:
    """Mean accuracy and standard error over subsets of labels, by row and (protocol, labels)."""
    rows = {}
    for name, title in measure.ROWS.items():
        values = json.loads((out / "accuracy" / f"{name}.json").read_text())
        rows[title] = {
            tuple(key.split()): (
                float(np.mean(v)),
                float(np.std(v, ddof=1)) / len(v) ** 0.5 if len(v) > 1 else 0.0,
            )
            for key, v in values.items()
        }
    return rows


def text_table(out: Path) -> str:
    """The table in Markdown."""
    return charts.table(cells(out))


def caption(out: Path, images: str) -> str:
    """The title of the table."""
    source = tfds_dataset.Split(out / "images", "test")
    return f"Accuracy on {len(source)} held-out {images} in percent, by labels per class:"


def write(out: Path, images: str, commands: Sequence[Job], say: Callable[[str], None]):
    """Writes OUT/index.html and accuracy.md from the outputs of the finished commands."""
    say("page: accuracies and curves")
    rows = cells(out)
    atomic.write_text(out / "accuracy.md", charts.table(rows) + "\n")
    columns = list(next(iter(rows.values())))
    body = [
        [title, *(html.Number(f"{row[c][0]:.1f}") for c in columns)] for title, row in rows.items()
    ]
    marked = [list(rows).index(measure.ROWS["both"])]
    table = html.table(("features", *map(" ".join, columns)), body, marked)
    logs = [metrics_log.read(out / "runs" / name) for name in RUNS]
    with plot.plt.rc_context(STYLE):
        bars, curves = io.BytesIO(), io.BytesIO()
        charts.accuracies(rows, bars, format="svg")
        plot.draw(logs, METRICS, curves, format="svg")
        say("page: tokens of the encoders")
        tokens = tokens_figure(out)
        say("page: predictions of D-iGPT")
        predictions = predictions_figure(out)
    steps, key = logs[0].last, ("linear", "all")
    cards = html.cards(
        (title, f"{rows[title][key][0]:.1f} %", "linear, all labels")
        for title in (measure.ROWS[name] for name in ("both", "pixels", "raw", "teacher"))
    )
    sections = {
        "Accuracy of frozen features": html.note(caption(out, images))
        + table
        + html.figure(bars.getvalue(), "svg+xml", "Mean of 3 subsets of labels, standard error.")
        + html.note(LIMITS),
        "Images and patch tokens": html.figure(
            tokens,
            "png",
            "Test images, and their patch tokens as colors: the first three principal components "
            "of each encoder's tokens over these images are red, green and blue.",
        ),
        "Predicted tokens": html.figure(
            predictions,
            "png",
            "Held-out images with the rank of each segment in a random order, the teacher's tokens "
            "and those that D-iGPT predicts with their cosines to the teacher's; the last row is "
            "the cosine of a constant guess.",
        ),
        "Losses": html.figure(
            curves.getvalue(), "svg+xml", "Losses on training and held-out images, by step."
        ),
        "Commands": html.preformatted("\n".join(shown(job, out) for job in commands)),
        "Next": html.preformatted(next_steps(short(str(out)))),
    }
    say(f"page: features of {out.name}/timm differ by at most {export_error(out):.1e}")
    text = html.page(
        "dgpt_jax quickstart",
        sections,
        cards,
        subtitle=f"Images, teacher, token store, {len(RUNS)} pretrainings of {steps} steps, "
        f"probes and an export, on this machine's CPU. Image set: {images}.",
    )
    atomic.write_text(out / FILE, text)


def examples(out: Path) -> tuple[np.ndarray, list[str]]:
    """Test images of different classes, evenly spaced, and the names of their classes."""
    source = tfds_dataset.Split(out / "images", "test")
    labels = np.array([example["label"] for example in source])
    classes = np.unique(labels)
    classes = classes[:: max(1, len(classes) // EXAMPLES)][:EXAMPLES]
    chosen = [int(np.flatnonzero(labels == label)[label % 7]) for label in classes]
    images = np.stack([image_ops.decode_image(source[i]["image"]) for i in chosen])
    names = source.features["label"].names
    return images, [names[label] for label in classes]


def tokens_figure(out: Path) -> bytes:
    """A PNG file: test images, and PCA colors of patch tokens of encoders and the teacher."""
    images, names = examples(out)
    both, pixels = (api.load_encoder(out / "runs" / name) for name in ("both", "pixels"))
    encoders = {"untrained": api.untrained(both.model, seed=0), "iGPT (pixels)": pixels}
    rows = {"image": images}
    for name, encoder in (encoders | {"D-iGPT": both}).items():
        rows[name] = _colors(np.asarray(encoder.tokens(images))[:, 1:])
    teacher = teacher_loading.load(str(out / "teacher"))
    tokens = teacher_vit.teacher_tokens(teacher.tower, teacher.params, jnp.asarray(images))
    rows["teacher"] = _colors(np.asarray(tokens)[:, 1:])
    file = io.BytesIO()
    grid(rows, file, {"image": names})
    return file.getvalue()


def predictions_figure(out: Path) -> bytes:
    """A PNG file: tokens that D-iGPT predicts for test images, beside the teacher's."""
    run, store = out / "runs" / "both", out / "tokens_test"
    args = visualize.parse(
        [f"{run}", "--show=predictions", f"--store={store}", "--count=8", f"--out={out / FILE}"]
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its note on --count
        rows, captions = visualize.show_predictions(args)
    file = io.BytesIO()
    grid(rows, file, captions)
    return file.getvalue()


def _colors(tokens: np.ndarray) -> np.ndarray:
    """Colors (B, side, side, 3) of patch tokens (B, N, D)."""
    side = round(tokens.shape[1] ** 0.5)
    return pca_colors(tokens).reshape(len(tokens), side, side, 3)


def export_error(out: Path) -> float:
    """Largest difference between features of the checkpoint and of the export to timm."""
    images, _ = examples(out)
    encoders = (api.load_encoder(path) for path in (out / "runs" / "both", out / "timm"))
    expected, exported = (encoder.features(images, "mean") for encoder in encoders)
    return float(jnp.abs(expected - exported).max())


def short(text: str) -> str:
    """Text with paths below the current directory relative to it."""
    return text.replace(f"{Path.cwd()}/", "")


def next_steps(out: str) -> str:
    """Commands to go on with, commented."""
    start = invocation.command
    return f"""\
# Your own images: a folder with train/CLASS/… and val/CLASS/…, and a CLIP model; see README.md
{start("import")} SRC --out=IMAGES
# Fine-tune this encoder on all labels, in about a minute
{start("train")} --config=quickstart_finetune --workdir=TUNED \\
    --config.init.weights={out}/runs/both --config.data.path={out}/images \\
    --config.evals.heldout={out}/images
# Nearest neighbors of test images by the encoder's features
{start("visualize")} {out}/runs/both {out}/pictures/test --show=neighbors --out=neighbors.png"""


def shown(job: Job, out: Path) -> str:
    """The command of a job as in the documentation, in lines of at most 100 columns."""
    line = short(job.line).replace("python -m dgpt_jax ", "dgpt ")
    lines = textwrap.wrap(
        line, 98, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return f"# {job.about}\n" + " \\\n".join(lines)
