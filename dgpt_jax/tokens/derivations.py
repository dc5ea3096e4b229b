"""Subsets, unions and divisions of token stores, to be written by derive."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from dgpt_jax.data import class_names
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.tokens import derive, selection
from dgpt_jax.tokens.derive import Derived
from dgpt_jax.tokens.store_parts import Index, Part, SourceStore, names_of

TEACHER = ("hash", "dtype", "width", "tower")  # what tokens depend on
VIEWS = ("crop_scale", "crop_ratio", "flip")  # of one distribution of crops


def subset(
    store: SourceStore, index: Index, rows: np.ndarray, out: AnyPath, **selected: Any
) -> Derived:
    """Returns the store of some examples, in their order. selected: how they were. Raises UserError
    if there are none."""
    if not len(rows):
        chosen = ", ".join(f"{name} {value}" for name, value in selected.items())
        raise UserError(
            f"{out} would be empty: {chosen} selects none of {counted(len(store), 'example')} of "
            f"{store.path}: select more"
        )
    part = Part(store, index, rows)
    info = derive.describe(store.info, out, [part], _origin(store.info.source), **selected)
    return Derived(epath.Path(out), info, (part,))


def division(
    store: SourceStore, index: Index, outs: tuple[AnyPath, AnyPath], fraction: float, seed: int
) -> tuple[Derived, Derived]:
    """Returns two stores: one of the other examples, and one of about `fraction` of them, chosen by
    a hash of the id and the seed. Raises UserError if one would be empty."""
    heldout = selection.fractions(index, seed) < fraction
    first, second = (
        subset(store, index, np.flatnonzero(rows), out, fraction=fraction, seed=seed, side=side)
        for rows, out, side in ((~heldout, outs[0], "rest"), (heldout, outs[1], "fraction"))
    )
    return first, second


def union(stores: Sequence[SourceStore], indices: Sequence[Index], out: AnyPath) -> Derived:
    """Returns the store of the examples of several, one after the other. Raises UserError if they
    have common ids, or differ in anything but their sources."""
    for other in stores[1:]:
        require_same_kind(stores[0], other)
    _require_disjoint(stores, indices)
    parts = tuple(
        Part(store, index, np.arange(len(store), dtype=np.int64))
        for store, index in zip(stores, indices, strict=True)
    )
    infos, counts = [store.info for store in stores], [len(store) for store in stores]
    least, mean = zip(*(info.teacher.cosine for info in infos), strict=True)
    seeds = [info.views.get("seed") for info in infos]
    joined = {
        key: "+".join(dict.fromkeys(str(info.source.get(key, "?")) for info in infos))
        for key in ("name", "version", "split")
    }
    teacher = dataclasses.replace(
        infos[0].teacher,
        cosine=(min(least), float(np.average(mean, weights=counts))),
        variance=float(np.average([info.teacher.variance for info in infos], weights=counts)),
    )
    info = dataclasses.replace(
        infos[0],
        teacher=teacher,
        views=infos[0].views | ({} if len(set(seeds)) == 1 else {"seed": seeds}),
    )
    return Derived(epath.Path(out), derive.describe(info, out, parts, joined, merged=True), parts)


def _origin(source: dict) -> dict:
    """Name, version and split of the images that a store was built from."""
    return {key: source[key] for key in ("name", "version", "split") if key in source}


def require_same_kind(first: SourceStore, other: SourceStore) -> None:
    """Raises UserError unless tokens, images, views and labels of two stores have one meaning."""
    a, b = first.info, other.info
    of_a, of_b = a.teacher.weights, b.teacher.weights
    pairs = {f"teacher's {key}": (of_a.get(key), of_b.get(key)) for key in TEACHER}
    pairs |= {
        name: (getattr(a.teacher, name), getattr(b.teacher, name))
        for name in ("codec", "grid", "cls", "width")
    }
    pairs["size of images"] = (a.image.height, b.image.height)
    pairs["encoding of images"] = (a.image.encoding, b.image.encoding)
    pairs["number of views"] = (len(first.splits), len(other.splits))
    pairs |= {f"views' {key}": (a.views.get(key), b.views.get(key)) for key in VIEWS}
    for name, (expected, actual) in pairs.items():
        if actual != expected:
            raise UserError(
                f"{other.path} has another {name} than {first.path}, {_short(actual)} and "
                f"{_short(expected)}: merge stores of one teacher and one config"
            )
    _require_same_codec(first, other)
    _require_same_labels(first, other)
    if first.features.to_json() != other.features.to_json():
        raise UserError(
            f"{other.path} has records of other features than {first.path} (features.json): build "
            f"both with one version"
        )


def _require_same_codec(first: SourceStore, other: SourceStore) -> None:
    a, b = (store.info.teacher.load_codec(store.path) for store in (first, other))
    if not a.equals(b):
        raise UserError(
            f"{other.path} has other scales or another PCA basis of codec {b.name} than "
            f"{first.path}: build it with --config.codec_from={first.path}"
        )


def _require_same_labels(first: SourceStore, other: SourceStore) -> None:
    a, b = first.class_names, other.class_names
    if a is None or b is None:
        if a is not b:
            labelled, unlabelled = (first, other) if b is None else (other, first)
            raise UserError(
                f"{labelled.path} has labels and {unlabelled.path} has none: build both of "
                f"labelled images, or both without labels"
            )
    elif a != b:
        i = class_names.first_difference(b, a)
        names = (class_names.summary(x, 3) for x in (b, a))
        where = f"class {i} differs: " if i is not None else ""
        raise UserError(
            f"{other.path} and {first.path} have other class names: {where}{' and '.join(names)}: "
            f"import both with the same classes"
        )


def _require_disjoint(stores: Sequence[SourceStore], indices: Sequence[Index]) -> None:
    """Raises UserError if an id is in two stores."""
    for i, second in enumerate(indices):
        for first, store in zip(indices[:i], stores[:i], strict=True):
            rows = np.flatnonzero(np.isin(second.keys, first.keys))
            if len(rows):
                names = names_of(stores[i], rows[:4])
                raise UserError(
                    f"{stores[i].path} has {counted(len(rows), 'id')} of {store.path}: "
                    f"{selection.some(names)}: merge stores of other images, or extract the rest"
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
