"""Reading and writing weight files. Nothing here runs code that a file brings along."""

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dgpt_jax.convert import contents, torch_files
from dgpt_jax.convert.json_files import group, read_json, shown
from dgpt_jax.convert.torch_files import line
from dgpt_jax.schema import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": "F32", "float16": "F16"}  # what is written, by safetensors' names
# What programs put before every name: PyTorch's parallel, compiled and averaged modules, trainers.
PREFIXES = ("module.", "model.", "_orig_mod.")
COUNTER = "n_averaged"  # the one array beside an averaged module


class Read(NamedTuple):
    """What a file holds.

    state: its arrays; None for a directory of checkpoints. path: the file, with #KEY where it holds
    several state dicts. notes: what was chosen, to print.
    """

    state: dict[str, np.ndarray] | None
    path: Path
    notes: tuple[str, ...]


def split(path) -> tuple[Path, str | None]:
    """(file, key) of FILE#KEY; of another path, that path and None."""
    path = Path(path)
    name, mark, key = path.name.partition("#")
    if not mark or path.exists():
        return path, None
    return path.with_name(name) if name else path, key


def read(path) -> Read:
    """The arrays of a file of safetensors, of torch.save or of NumPy's savez, found by its
    contents; or of the shards that an index names, or the INDEX of a directory.

    FILE#KEY names one of several state dicts in a file of torch.save. One common prefix of all
    names is left out. Half precision becomes float32. Raises UserError on anything that is not
    plain weights.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{path}: weights are read from a local disk, copy them to one")
    path, key = split(path)
    if path.is_dir() and (path / INDEX).is_file():
        path = path / INDEX
    if not path.is_file():
        raise UserError(f"no such weights file: {path}")
    state, taken, notes = _read_file(path, key)
    if empty := next((name for name, array in state.items() if not array.size), None):
        raise UserError(f"{path}: {empty} has shape {state[empty].shape}, which holds no number")
    state, prefix = _without_prefix(state)
    if prefix:
        notes.append(f"{path}: all names begin with {prefix}, which is left out")
    return Read(state, path.with_name(f"{path.name}#{taken}") if taken else path, tuple(notes))


def read_state(path) -> dict[str, np.ndarray]:
    """The arrays alone of `read`."""
    return read(path).state


def _read_file(path: Path, key: str | None = None, shard: bool = False):
    """(arrays by their names in a file, the key that was taken or None, notes)."""
    kind = contents.kind(path)
    if key is not None and kind != "torch":
        raise UserError(f"{path} holds one set of weights, #{key} is for files of torch.save")
    if kind == "torch":
        return torch_files.read(path, key)
    if kind == "index":
        if shard:
            raise UserError(f"{path} is JSON, and an index names it as a shard of weights")
        return _read_shards(path), None, []
    return (_read_npz if kind == "npz" else _read_safetensors)(path), None, []


def _without_prefix(state: dict) -> tuple[dict, str]:
    """(arrays by their names without what of PREFIXES all begin with, that prefix)."""
    prefix = ""
    while True:
        names = [name.removeprefix(prefix) for name in state if name != COUNTER]
        more = next((p for p in PREFIXES if names and all(n.startswith(p) for n in names)), None)
        if more is None:
            break
        prefix += more
    if not prefix:
        return state, ""
    return {n.removeprefix(prefix): x for n, x in state.items() if n != COUNTER}, prefix


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    """The arrays of all files that an index beside them names."""
    shards = group(read_json(path), "weight_map", path)
    if not shards:
        raise UserError(f"{path} is JSON without a weight_map; {contents.TAKEN}")
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name:
            raise UserError(f"{path} names a shard outside its directory: {shown(name)}")
        if not (path.parent / name).is_file():
            raise UserError(f"{path} names {shown(name)}, and there is no such file beside it")
        state |= _read_file(path.parent / name, shard=True)[0]
    missing = sorted(set(shards) - set(state))
    if missing:
        raise UserError(f"{path} names arrays that its shards have not: {', '.join(missing[:8])}")
    return state


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _float32(file[name]) for name in file.files}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is no readable .npz of plain arrays: {line(e)}") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        for name, kind in kinds.items():
            if kind == "F64":  # JAX would round it silently
                raise UserError(
                    f"{path}: {name} is float64, weights are float32, float16 or bfloat16"
                )
        return {name: _tensor(path, name, kind) for name, kind in kinds.items()}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is no readable safetensors file: {line(e)}") from None


def _tensor(path: Path, name: str, kind: str) -> np.ndarray:
    """One array of a safetensors file. Opened anew, since an open file keeps what was read."""
    with safe_open(path, "flax" if kind == "BF16" else "numpy") as file:  # NumPy knows no bfloat16
        return _float32(np.asarray(file.get_tensor(name)))


def _float32(array: np.ndarray) -> np.ndarray:
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array


@contextlib.contextmanager
def replacing(path):
    """A context: the path of a temporary file beside `path`, which takes its place at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written(path):
    """As `replacing`. Raises UserError where the system does not take the file."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror or e}") from e


def write_safetensors(path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]):
    """Writes atomically, an array after the other: at no time a second copy of all of them."""
    header: dict = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in state.items():
        if array.dtype.name not in DTYPES:
            raise UserError(f"{path}: {name} is {array.dtype}, not {' or '.join(DTYPES)}")
        span = [offset, offset + array.nbytes]
        kind = DTYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in state.values():
            file.write(np.ascontiguousarray(array))


def write_torch(path, content: Mapping[str, Mapping[str, np.ndarray]]):
    """Writes {key: state dict} atomically with torch.save. Raises UserError without PyTorch."""
    torch_files.import_torch(path, "written")
    import torch

    tensors = {
        key: {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
        for key, state in content.items()
    }
    with replacing(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as e:  # what it makes of a full disk
            raise UserError(f"{path} cannot be written: {line(e)}") from e


def read_metadata(path) -> dict[str, str]:
    """The metadata of a safetensors file; none of another. Raises UserError."""
    path, key = split(path)
    if key is not None or contents.kind(path) != "safetensors":
        return {}
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is no readable safetensors file: {line(e)}") from None


def hash_state(state: Mapping[str, np.ndarray]) -> str:
    """16 hex digits of SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
