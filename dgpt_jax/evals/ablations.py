"""Studies: which changes of a config are compared, and what the numbers of several seeds say.

A study has a row for each way of training; the first is the baseline. All rows are trained from the
same seeds, and a row's difference to the baseline is taken seed by seed, so that what a seed does
to both (initial weights, order of the data) drops out.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from dgpt_jax import schema
from dgpt_jax.config import Train

# Stores of teacher tokens that rows read (data.path): fields of config.Tokens.
STORES = {
    "tokens": {"codec": "int8"},
    "tokens_float16": {"codec": "float16"},
    "tokens_int4": {"codec": "int4"},
    "tokens_pca": {"codec": "int8", "pca": 16},
}
# What has no training: raw pixels and the teacher once, the encoder as each seed begins it.
FRAME = {"raw pixels": False, "untrained encoder": True, "the teacher": False}


@dataclass(frozen=True)
class Study:
    """about: one line. paper: what it has on this. rows: {name: {config path: value}}."""

    about: str
    paper: str
    rows: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training, or one row of the frame (`changes` None): what is finished or not."""

    row: str
    seed: int
    changes: Mapping[str, Any] | None

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all others in a directory of studies."""
        return self.name, self.seed

    @property
    def name(self) -> str:
        """The same for rows of all studies that train alike: a directory."""
        if self.changes is None:
            return self.row.replace(" ", "_")
        words = (f"{path}={value}" for path, value in sorted(self.changes.items()))
        kept = ",".join(words).translate(str.maketrans({" ": "", "/": "-"}))
        return kept or "base"


def studies(base: Train) -> dict[str, Study]:
    """All studies of a base config, by name."""
    model = base.model
    online = {"data.targets": "online", "data.path": "images", "teacher.weights": "teacher"}
    pixels = {"data.targets": "pixels", "data.path": "images", "loss.visible": 0.0}
    wide = model.decoder_width
    return {
        "views": Study(
            "K stored views of an image against fresh crops every epoch, at equal steps",
            "fresh crops only",
            {"online, fresh crops": online}
            | {f"K = {k}": {"data.views": k} for k in (1, 2, 4, 8, 16)},
        ),
        "decoders": Study(
            "the losses: next, visible, both; plain feature distillation, which needs no decoder",
            "Table 10: both 86.2, next 85.5, next + distillation 85.1, distillation 84.9, visible "
            "84.7",
            {
                "next + visible": {},
                "next": {"loss.visible": 0.0},
                "visible": {"loss.next": 0.0},
                "next + distillation": {"loss.visible": 0.0, "loss.direct": 1.0},
                "distillation": {
                    "loss.next": 0.0,
                    "loss.visible": 0.0,
                    "loss.direct": 1.0,
                    "model.segments": (1, 1),
                },
            },
        ),
        "codec": Study(
            "how the teacher's tokens are stored",
            "none are stored",
            {
                "float16": {"data.path": "tokens_float16"},
                "int8": {},
                "int4": {"data.path": "tokens_int4"},
                "int8, 16 of 64 PCA axes": {"data.path": "tokens_pca"},
            },
        ),
        "segments": Study(
            "into how many segments an image is cut",
            "Table 7: 4 segments 86.2, 14 85.8, 49 85.7, 2 85.6, 196 85.4, 1 85.3",
            {
                "4 segments": {},
                "1 segment (visible only)": {"model.segments": (1, 1), "loss.next": 0.0},
                "2 segments": {"model.segments": (1, 2)},
                "16 segments": {"model.segments": (4, 4)},
            },
        ),
        "decoder_size": Study(
            "depth and width of the decoders",
            "Table 9: depth 2 86.2, 4 86.0, 1 85.6; width 1024 86.2, 768 85.9, 512 85.8",
            {
                f"depth 2, width {wide}": {},
                f"depth 1, width {wide}": {"model.decoder_depth": 1},
                f"depth 4, width {wide}": {"model.decoder_depth": 4},
                f"depth 2, width {wide // 2}": {"model.decoder_width": wide // 2},
                f"depth 2, width {wide * 2}": {"model.decoder_width": wide * 2},
            },
        ),
        "target": Study(
            "the teacher's tokens against pixels (iGPT)",
            "Table 5: CLIP 86.2, DINO 84.7, pixels 82.0",
            {
                "teacher's tokens": {},
                "teacher's tokens, next only": {"loss.visible": 0.0},
                "pixels, next only": pixels,
            },
        ),
        "order": Study(
            "the order of the segments: random for every image and step, or raster",
            "never compared",
            {"random": {}, "raster": {"data.order": "raster"}},
        ),
        "taps": Study(
            "which depths of the encoder feed the decoders",
            "never compared",
            {
                f"taps {', '.join(map(str, model.taps))}": {},
                f"tap {model.depth} only": {"model.taps": (model.depth,)},
            },
        ),
        "cls_mask": Study(
            "who sees the CLS token in pretraining",
            "never compared",
            {
                "last segment (official)": {},
                "nobody": {"model.cls_mask": "self"},
                "all": {"model.cls_mask": "all"},
            },
        ),
    }


def runs(study: Study, base: Train, seeds: Iterable[int]) -> list[Run]:
    """Every run of a study, seed by seed, so that what is finished first is whole rows."""
    before = schema.flatten(schema.to_dict(base))
    changed = {
        row: {path: value for path, value in changes.items() if before[path] != value}
        for row, changes in study.rows.items()
    }
    found = []
    for i, seed in enumerate(seeds):
        found += [Run(row, seed, None) for row, seeded in FRAME.items() if seeded or not i]
        found += [Run(row, seed, changes) for row, changes in changed.items()]
    return found


def views(study: Study, base: Train) -> dict[str, int]:
    """{store: how many of its views some row reads}, of STORES."""
    needed = {}
    for changes in study.rows.values():
        store = changes.get("data.path", base.data.path)
        if store in STORES:
            number = changes.get("data.views", base.data.views)
            needed[store] = max(number, needed.get(store, 0))
    return needed


def config_of(run: Run, base: Train, out) -> Train:
    """The config of a training whose data are below the directory `out`. Raises UserError."""
    config = schema.to_dict(base) | {"seed": run.seed}
    for path, value in run.changes.items():
        *groups, last = path.split(".")
        group = config
        for name in groups:
            group = group[name]
        group[last] = value
    for group, name in (("data", "path"), ("teacher", "weights")):
        if config[group][name]:
            config[group][name] = str(out / config[group][name])
    return schema.parse(Train, config)


def interval(values) -> tuple[float, float]:
    """(mean, half the 95 % interval of Student's t); NaN for what a single value cannot tell."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def means(numbers: Mapping[str, Mapping[int, Mapping]]) -> dict[str, dict]:
    """{row: {column: interval}} of {row: {seed: {column: accuracy}}}."""
    return {
        row: {
            column: interval([found[column] for found in seeds.values()])
            for column in next(iter(seeds.values()))
        }
        for row, seeds in numbers.items()
    }


def differences(numbers: Mapping[str, Mapping[int, Mapping]], baseline: str) -> dict[str, dict]:
    """The same of every row minus the baseline, over the seeds that both have."""
    found, of = {}, numbers.get(baseline, {})
    for row, seeds in numbers.items():
        both = sorted(set(seeds) & set(of))
        if row == baseline or not both:
            continue
        found[row] = {
            column: interval([seeds[s][column] - of[s][column] for s in both])
            for column in seeds[both[0]]
        }
    return found


def table(cells: Mapping[str, Mapping], title: str, sign: str = "") -> str:
    """Markdown of {row: {column: (mean, half an interval)}}. `sign` "+": of differences; those
    whose interval does not hold 0 are bold."""

    def shown(mean, half):
        if math.isnan(half):
            return f"{mean:{sign}.1f}"
        text = f"{mean:{sign}.1f} ± {half:.1f}"
        return f"**{text}**" if sign and abs(mean) > half else text

    columns = list(next(iter(cells.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, found in cells.items():
        lines.append(f"| {row} | {' | '.join(shown(*found[column]) for column in columns)} |")
    return "\n".join(lines)
