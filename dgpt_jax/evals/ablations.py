"""Ablation studies: the compared config changes, and statistics over several seeds.

A study has a row for each configuration; the first is the baseline. All rows are trained with the
same seeds and compared to the baseline seed by seed, so that effects of the seed (initial weights,
data order) cancel.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dgpt_jax.config import TrainConfig, schema
from dgpt_jax.monitoring import markdown

# Token stores that rows read (data.path) → fields of TokensConfig.
STORES = {
    "tokens": {"codec": "int8"},
    "tokens_float16": {"codec": "float16"},
    "tokens_int4": {"codec": "int4"},
    "tokens_pca": {"codec": "int8", "pca": 16},
}
# Rows without training → True if evaluated for each seed, False for once.
REFERENCE_ROWS = {"raw pixels": False, "untrained encoder": True, "the teacher": False}


@dataclass(frozen=True)
class Study:
    """about: one line. paper: its results on this. rows: {name: {config path: value}}."""

    about: str
    paper: str
    rows: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A training, or one of REFERENCE_ROWS (`changes` None): the unit that is finished or not."""

    row: str
    seed: int
    changes: Mapping[str, Any] | None

    @property
    def key(self) -> tuple[str, int]:
        """Unique among the runs of all studies in a directory."""
        return self.name, self.seed

    @property
    def name(self) -> str:
        """Directory name, shared by the rows of all studies that train the same config."""
        if self.changes is None:
            return self.row.replace(" ", "_")
        changes = (f"{path}={value}" for path, value in sorted(self.changes.items()))
        name = ",".join(changes).translate(str.maketrans({" ": "", "/": "-"}))
        return name or "base"


def studies(base: TrainConfig) -> dict[str, Study]:
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
                "next + distillation": {"loss.visible": 0.0, "loss.distill": 1.0},
                "distillation": {
                    "loss.next": 0.0,
                    "loss.visible": 0.0,
                    "loss.distill": 1.0,
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
                f"taps {', '.join(map(str, model.taps or ()))}": {},
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


def runs(study: Study, base: TrainConfig, seeds: Iterable[int]) -> list[Run]:
    """All runs of a study, seed by seed, so that an interrupted study has complete seeds."""
    before = schema.flatten(schema.to_dict(base))
    changed = {
        row: {path: value for path, value in changes.items() if before[path] != value}
        for row, changes in study.rows.items()
    }
    result = []
    for i, seed in enumerate(seeds):
        rows = [row for row, per_seed in REFERENCE_ROWS.items() if per_seed or not i]
        result += [Run(row, seed, None) for row in rows]
        result += [Run(row, seed, changes) for row, changes in changed.items()]
    return result


def views(study: Study, base: TrainConfig) -> dict[str, int]:
    """{store: largest number of its views that a row reads}, of STORES."""
    needed = {}
    for changes in study.rows.values():
        store = changes.get("data.path", base.data.path)
        if store in STORES:
            number = changes.get("data.views", base.data.views)
            needed[store] = max(number, needed.get(store, 0))
    return needed


def config_of(run: Run, base: TrainConfig, out: Path) -> TrainConfig:
    """Config of a training whose data is below the directory `out`. Raises UserError."""
    config: dict[str, Any] = schema.to_dict(base) | {"seed": run.seed}
    for path, value in (run.changes or {}).items():
        *groups, last = path.split(".")
        group: Any = config
        for name in groups:
            group = group[name]
        group[last] = value
    for group, name in (("data", "path"), ("teacher", "weights")):
        if config[group][name]:
            config[group][name] = str(out / config[group][name])
    return schema.parse(TrainConfig, config)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of Student's 95 % t-interval), NaN where there are too few values."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()) if len(x) else math.nan, math.nan
    quantile = stats.t.ppf(0.975, len(x) - 1)
    return float(x.mean()), float(quantile * x.std(ddof=1) / len(x) ** 0.5)


def means(numbers: Mapping[str, Mapping[int, Mapping]]) -> dict[str, dict]:
    """{row: {column: interval}} of {row: {seed: {column: accuracy}}}."""
    return {
        row: {
            column: interval([columns[column] for columns in seeds.values()])
            for column in next(iter(seeds.values()))
        }
        for row, seeds in numbers.items()
    }


def differences(numbers: Mapping[str, Mapping[int, Mapping]], baseline: str) -> dict[str, dict]:
    """The same of each row minus the baseline, over the seeds that both have."""
    result, base = {}, numbers.get(baseline, {})
    for row, seeds in numbers.items():
        common = sorted(set(seeds) & set(base))
        if row == baseline or not common:
            continue
        result[row] = {
            column: interval([seeds[s][column] - base[s][column] for s in common])
            for column in seeds[common[0]]
        }
    return result


def table(cells: Mapping[str, Mapping], title: str, sign: str = "") -> str:
    """Markdown of {row: {column: (mean, half width of its interval)}}. sign: "+" for differences,
    which are bold if their interval excludes 0."""

    def cell(mean, half):
        if math.isnan(half):
            return f"{mean:{sign}.1f}"
        text = f"{mean:{sign}.1f} ± {half:.1f}"
        return f"**{text}**" if sign and abs(mean) > half else text

    columns = list(next(iter(cells.values())))
    rows = ([row, *(cell(*values[c]) for c in columns)] for row, values in cells.items())
    return markdown.table((title, *columns), rows)
