"""Text and figure of `store info`."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dgpt_jax import cli, invocation
from dgpt_jax.commands import next_commands
from dgpt_jax.data import image_ops
from dgpt_jax.errors import counted
from dgpt_jax.storage import disk_space
from dgpt_jax.tokens import describe

MAX_ROWS = 8  # splits in a figure
SIDE = 224  # pixels of images of other sizes than a store's
NAME = 18  # characters above an image


def lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yields the description, a line per fact."""
    d = description
    yield f"{d['path']}: {'token store' if 'teacher' in d else 'image dataset, without tokens'}"
    yield from _contents(d)
    if "teacher" in d:
        yield from _store(d)
    yield f"state        {_state(d)}"


def _contents(d: Mapping[str, Any]) -> Iterator[str]:
    kind = "views" if "teacher" in d else "splits"
    if "splits" in d:
        counts = ", ".join(f"{s['name']} {s['examples']}" for s in d["splits"][:MAX_ROWS])
        more = f", … ({len(d['splits'])})" if d["splits"][MAX_ROWS:] else ""
        yield f"{kind:12} {counts}{more} examples"
        classes = d["classes"]
        yield f"labels       {counted(classes, 'class', 'classes') if classes else 'none'}"
    yield f"size         {disk_space.size(d['bytes'])} in {counted(d['shards'], 'shard')}"
    if sizes := d.get("record_bytes"):
        parts = ", ".join(
            f"{name} {sizes[name]:,.0f}"
            for name in ("image", "tokens", "rest")
            if sizes[name] is not None and not (name == "tokens" and "teacher" not in d)
        )
        yield f"record       {sizes['total']:,.0f} bytes: {parts}"


def _store(d: Mapping[str, Any]) -> Iterator[str]:
    source = d["source"]
    yield f"images       {d['image']['size']} × {d['image']['size']}, {d['image']['encoding']}"
    yield f"tokens       {_tokens(d['tokens'])}"
    yield f"teacher      {_teacher(d['teacher'])}"
    for other in d["further_teachers"]:
        yield f"{other['name']:12} {_tokens(other['tokens'])}, {disk_space.size(other['bytes'])}"
        yield f"{'':12} {_teacher(other['teacher'])}"
        if not other["complete"]:
            yield f"{'':12} unfinished; finish it with: {other['command']}"
    views = ", ".join(f"{key} {value}" for key, value in d["views"].items())
    yield f"crops        {views}"
    shown = {key: value for key, value in source.items() if key != "derived"}
    yield f"source       {', '.join(f'{key} {value}' for key, value in shown.items())}"
    if derived := source.get("derived"):
        how = ", ".join(f"{key} {value}" for key, value in derived.items() if key != "from")
        parts = [f"{p['source'].get('name', '?')} ({p['examples']})" for p in derived["from"]]
        yield f"derived      {how}, from {', '.join(parts)}"
    yield f"format       {d['format']}, written by version {d['code_version']}"


def _tokens(tokens: Mapping[str, Any]) -> str:
    cosine, pca = tokens["cosine"], f", PCA ({tokens['variance']:.2%})" * tokens["pca"]
    return (
        f"{tokens['count']} × {tokens['width']}, {tokens['codec']}{pca}, cosine to exact tokens "
        f"{cosine['mean']:.5f} (least {cosine['least']:.5f})"
    )


def _teacher(teacher: Mapping[str, Any]) -> str:
    names = ("dtype", "image_size", "mean", "std")
    settings = ", ".join(f"{key} {teacher[key]}" for key in names if teacher.get(key))
    return f"{teacher['name']}, weights {teacher['hash']}, {settings}"


def _state(d: Mapping[str, Any]) -> str:
    if "finish" in d:
        return f"unfinished: {counted(d['shards'], 'complete shard')}"
    answers = {
        "complete": d["complete"], "readable": d["readable"], "checksums equal": d["checksums"],
    }  # fmt: skip
    words = {True: "yes", False: "no", None: "not tested"}
    state = ", ".join(f"{name}: {words[value]}" for name, value in answers.items())
    verify = f"; tokens: `{invocation.command('verify')}` tests them" if "teacher" in d else ""
    return state + verify


def next_command(d: Mapping[str, Any]) -> str:
    """Returns the command that finishes a store, trains on it, or builds one of a dataset."""
    if "finish" in d:
        return d["finish"]
    if "teacher" in d:
        return next_commands.train(d["path"], examples=d["splits"][0]["examples"])
    flags = [f"--config.source={d['path']}"]
    names = [split["name"] for split in d["splits"]]
    if "train" not in names:
        flags.append(f"--config.split={names[0]}")
    return (
        f"{invocation.command('tokens')} --config=tokens_in1k_openclip_h14 {shlex.join(flags)} "
        f"--config.teacher.weights=CLIP_DIR --out=TOKENS"
    )


def figure(d: Mapping[str, Any], count: int) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Returns rows and captions (ids) of image_grid.grid: `count` stored images of each split.
    Raises UserError if they cannot be read."""
    rows, captions = {}, {}
    splits = [split["name"] for split in d.get("splits", ())]
    if len(splits) > MAX_ROWS:
        cli.say(f"the figure has the first {MAX_ROWS} of {counted(len(splits), 'view')}")
    for name in splits[:MAX_ROWS]:
        ids, images = describe.sample(d["path"], name, count)
        side = SIDE if len({image.shape for image in images}) > 1 else None
        rows[name] = np.stack(
            [image_ops.center_crop(i, side, side, squash=False) if side else i for i in images]
        )
        captions[name] = [text if len(text) <= NAME else f"…{text[1 - NAME :]}" for text in ids]
    return rows, captions
