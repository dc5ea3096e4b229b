"""Tables that map arrays of a state dict to this package's parameters.

Parameters are flat dicts, {"encoder/blocks/attn/qkv/kernel": array}; leaves of scanned blocks have
a leading layer axis. `read` and `write` are strict: every name and every leaf is used once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dgpt_jax.config import schema
from dgpt_jax.errors import UserError


@dataclass(frozen=True)
class ArrayEntry:
    """One array of a state dict.

    kind: "same"; "vector" (torch's (n,) against any shape); "linear" (torch's (out, in) against
    (in, out), or (parts · out, in) against (parts, in, out)); "conv" (torch's (out, channels, p, p)
    against (p·p·channels, out)).
    layer: index on the leaf's leading layer axis. part: index on the axis of stacked q, k, v.
    copies: other names with the same values. shape: of the array, if leaf and kind do not
    determine it.
    """

    name: str
    path: str
    kind: str = "same"
    layer: int | None = None
    part: int | None = None
    copies: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None

    def slot(self) -> tuple:
        """Index of the array in its leaf."""
        return tuple(i for i in (self.layer, self.part) if i is not None) or (...,)


def stored_shape(entry: ArrayEntry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the stored array whose slot in the parameters has the given shape."""
    if entry.shape is not None:
        return entry.shape
    if entry.kind == "linear":
        return (math.prod(shape[:-2]) * shape[-1], shape[-2])
    if entry.kind == "conv":
        patch = round((shape[0] / 3) ** 0.5)
        return (shape[1], 3, patch, patch)
    return (math.prod(shape),) if entry.kind == "vector" else tuple(shape)


def _from_torch(entry: ArrayEntry, value: np.ndarray, shape) -> np.ndarray:
    stored = stored_shape(entry, shape)
    if [n for n in value.shape if n != 1] != [n for n in stored if n != 1]:
        raise UserError(f"{entry.name} has shape {value.shape}, expected {stored}")
    value = value.reshape(stored)
    if entry.kind == "linear":
        value = value.reshape(*shape[:-2], -1, value.shape[-1]).swapaxes(-1, -2)
    elif entry.kind == "conv":
        value = value.transpose(2, 3, 1, 0)
    return value.reshape(shape)


def _to_torch(entry: ArrayEntry, value: np.ndarray) -> np.ndarray:
    stored = stored_shape(entry, value.shape)
    if entry.kind == "linear":
        return value.swapaxes(-1, -2).reshape(stored)
    if entry.kind == "conv":
        return value.reshape(*stored[2:], 3, -1).transpose(3, 2, 0, 1)
    return value.reshape(stored)


def read(
    entries: Iterable[ArrayEntry],
    state: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignore: Iterable[str] = (),
    what: str = "weights",
) -> dict[str, np.ndarray]:
    """Flat float32 parameters of the given shapes from a state dict, without copies if possible.

    what: source of the arrays, for messages. Raises UserError on missing names, names that neither
    an entry nor a prefix in `ignore` matches, wrong shapes or dtypes, and copies that differ.
    """
    entries = list(entries)
    named = {name for e in entries for name in (e.name, *e.copies)}
    missing = sorted(named - set(state))
    extra = sorted(n for n in set(state) - named if not n.startswith(tuple(ignore)))
    if missing or extra:
        raise UserError(f"{what}: {_names('missing', missing)}{_names('unknown', extra)}".rstrip())
    params: dict[str, np.ndarray] = {}
    filled = dict.fromkeys(shapes, 0)
    for entry in entries:
        value = state[entry.name]
        if value.dtype != np.float32:  # half precision is converted when the file is read
            raise UserError(
                f"{what}: {entry.name} is {value.dtype}, weights are float32, float16 or bfloat16"
            )
        for copy in entry.copies:
            if not np.array_equal(value, state[copy]):
                raise UserError(f"{what}: {entry.name} and {copy} must be equal but differ")
        filled[entry.path] += value.size
        if entry.slot() == (...,):
            params[entry.path] = _from_torch(entry, value, shapes[entry.path])
            continue
        if entry.path not in params:
            params[entry.path] = np.empty(shapes[entry.path], np.float32)
        slot = params[entry.path][entry.slot()]
        params[entry.path][entry.slot()] = _from_torch(entry, value, slot.shape)
    unfilled = [path for path, n in filled.items() if n != math.prod(shapes[path])]
    if unfilled:
        raise UserError(f"{what}: {_names('no source for', unfilled)}".rstrip())
    return params


def write(entries: Iterable[ArrayEntry], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State dict of flat parameters, as views if possible.

    Raises UserError if a parameter has no entry.
    """
    entries = list(entries)
    unmapped = sorted(set(params) - {e.path for e in entries})
    if unmapped:
        raise UserError(f"this layout cannot store {', '.join(unmapped)}")
    state = {}
    for entry in entries:
        value = np.asarray(params[entry.path], np.float32)[entry.slot()]
        for name in (entry.name, *entry.copies):
            state[name] = _to_torch(entry, value)
    return state


def describe(entries: Iterable[ArrayEntry], params: Mapping[str, np.ndarray]) -> list[str]:
    """One line per entry: name, shape, parameter path with index."""
    lines = []
    for entry in entries:
        index = "".join(f"[{i}]" for i in entry.slot() if i is not ...)
        shape = "folded into the preceding projection"
        if entry.path in params:
            shape = str(stored_shape(entry, params[entry.path][entry.slot()].shape))
        for name in (entry.name, *entry.copies):
            lines.append(f"{name}  {shape}  {entry.path}{index}")
    return lines


def _names(label: str, names: list[str], limit: int = 8) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{label} {', '.join(names[:limit])}{more}. "


def linear(name: str, path: str, **kwargs) -> list[ArrayEntry]:
    """Weight and bias of a torch Linear."""
    return [
        ArrayEntry(f"{name}.weight", f"{path}/kernel", "linear", **kwargs),
        ArrayEntry(f"{name}.bias", f"{path}/bias", "vector", **kwargs),
    ]


def norm(name: str, path: str, copies: Iterable[str] = (), **kwargs) -> list[ArrayEntry]:
    """Weight and bias of a torch LayerNorm."""
    return [
        ArrayEntry(
            f"{name}.{torch}", f"{path}/{flax}",
            copies=tuple(f"{copy}.{torch}" for copy in copies), **kwargs,
        )
        for torch, flax in (("weight", "scale"), ("bias", "bias"))
    ]  # fmt: skip


def prefixed(prefix: str, entries: Iterable[ArrayEntry]) -> list[ArrayEntry]:
    """Entries with the prefix before their names."""
    return [replace(entry, name=f"{prefix}{entry.name}") for entry in entries]


def timm_blocks(name: str, path: str, depth: int) -> list[ArrayEntry]:
    """Blocks of timm's ViT and its descendants, stacked."""
    entries = []
    for i in range(depth):
        entries += norm(f"{name}.{i}.norm1", f"{path}/norm1", layer=i)
        entries += linear(f"{name}.{i}.attn.qkv", f"{path}/attn/qkv", layer=i)
        entries += linear(f"{name}.{i}.attn.proj", f"{path}/attn/proj", layer=i)
        entries += norm(f"{name}.{i}.norm2", f"{path}/norm2", layer=i)
        entries += linear(f"{name}.{i}.mlp.fc1", f"{path}/mlp/fc1", layer=i)
        entries += linear(f"{name}.{i}.mlp.fc2", f"{path}/mlp/fc2", layer=i)
    return entries


def hugging_face_layers(name: str, depth: int) -> list[ArrayEntry]:
    """Blocks of Hugging Face's CLIP and its descendants, stacked under `blocks`."""
    entries = []
    for i in range(depth):
        layer = f"{name}.{i}"
        entries += norm(f"{layer}.layer_norm1", "blocks/norm1", layer=i)
        entries += norm(f"{layer}.layer_norm2", "blocks/norm2", layer=i)
        for part, letter in enumerate("qkv"):
            source = f"{layer}.self_attn.{letter}_proj"
            entries += linear(source, "blocks/attn/qkv", layer=i, part=part)
        entries += linear(f"{layer}.self_attn.out_proj", "blocks/attn/proj", layer=i)
        entries += linear(f"{layer}.mlp.fc1", "blocks/mlp/fc1", layer=i)
        entries += linear(f"{layer}.mlp.fc2", "blocks/mlp/fc2", layer=i)
    return entries


def patch_embed(name: str, path: str) -> list[ArrayEntry]:
    """Weight and bias of the patch embedding's convolution."""
    return [
        ArrayEntry(f"{name}.weight", f"{path}/kernel", "conv"),
        ArrayEntry(f"{name}.bias", f"{path}/bias"),
    ]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested dict of arrays (or shapes) as {"a/b": leaf}."""
    return schema.flatten(tree, "/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
