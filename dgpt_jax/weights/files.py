"""Reading and writing weight files, without running code that they contain."""

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dgpt_jax.errors import UserError
from dgpt_jax.weights import file_kind, torch_pickle
from dgpt_jax.weights.config_json import format_value, get_object, read_json
from dgpt_jax.weights.torch_pickle import one_line

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": "F32", "float16": "F16"}  # written dtypes by safetensors' names
# Prefixes of all names: PyTorch's parallel, compiled and averaged modules, trainers.
PREFIXES = ("module.", "model.", "_orig_mod.")
COUNTER = "n_averaged"  # the only other array of an averaged module


class Read(NamedTuple):
    """Contents of a weights file.

    state: its arrays; None for a checkpoint directory. path: the file, with #KEY if it contains
    several state dicts. notes: choices that were made, to print.
    """

    state: dict[str, np.ndarray] | None
    path: Path
    notes: tuple[str, ...]


def split(path: Path | str) -> tuple[Path, str | None]:
    """(file, key) of FILE#KEY; (path, None) of another path."""
    path = Path(path)
    if path.exists():
        return path, None
    text = os.fspath(path)
    for i in (i for i, character in enumerate(text) if character == "#"):
        if os.path.isfile(text[:i]):  # the key may contain a slash
            return Path(text[:i]), text[i + 1 :]
    name, separator, key = path.name.partition("#")
    if not separator:
        return path, None
    return path.with_name(name) if name else path, key


def read(path: Path | str) -> Read:
    """Reads arrays of a file by safetensors, torch.save or NumPy's savez, detected by its contents,
    or of the shards that an index lists; in a directory, the index INDEX.

    FILE#KEY selects one of several state dicts in a file by torch.save. A common prefix of all
    names is removed. Half precision becomes float32. Raises UserError unless weights are plain.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{path}: weights must be on a local disk: copy them there")
    path, key = split(path)
    if path.is_dir() and (path / INDEX).is_file():
        path = path / INDEX
    if not path.is_file():
        raise UserError(f"no such weights file: {path}")
    state, selected, notes = _read_file(path, key)
    if empty := next((name for name, array in state.items() if not array.size), None):
        raise UserError(f"{path}: {empty} is empty, of shape {state[empty].shape}")
    state, prefix = _without_prefix(state)
    if prefix:
        notes.append(f"{path}: removed the prefix {prefix} of all names")
    file = path.with_name(f"{path.name}#{selected}") if selected else path
    return Read(state, file, tuple(notes))


def read_state(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of `read`."""
    state = read(path).state
    assert state is not None
    return state


def _read_file(
    path: Path, key: str | None = None, shard: bool = False
) -> tuple[dict[str, np.ndarray], str | None, list[str]]:
    """(arrays by their names in a file, selected key or None, notes)."""
    kind = file_kind.kind(path)
    if key is not None and kind != "torch":
        raise UserError(f"{path} has one set of weights: #{key} is for files by torch.save")
    if kind == "torch":
        return torch_pickle.read(path, key)
    if kind == "index":
        if shard:
            raise UserError(f"{path} is JSON, but an index lists it as a shard of weights")
        return _read_shards(path), None, []
    return (_read_npz if kind == "npz" else _read_safetensors)(path), None, []


def _without_prefix(state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """(arrays without the combination of PREFIXES that all names start with, that prefix)."""
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
    """Arrays of all shards that an index lists."""
    shards = get_object(read_json(path), "weight_map", path)
    if not shards:
        raise UserError(f"{path} is JSON without a weight_map; {file_kind.SUPPORTED}")
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name:
            raise UserError(f"{path} lists a shard outside its directory: {format_value(name)}")
        if not (path.parent / name).is_file():
            raise UserError(f"{path} lists {format_value(name)}, which does not exist")
        state |= _read_file(path.parent / name, shard=True)[0]
    missing = sorted(set(shards) - set(state))
    if missing:
        raise UserError(f"{path} lists arrays that its shards lack: {', '.join(missing[:8])}")
    return state


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _float32(file[name]) for name in file.files}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is not a readable .npz of plain arrays: {one_line(e)}") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        for name, kind in kinds.items():
            if kind == "F64":  # JAX would round it silently
                raise UserError(f"{path}: {name} is float64, expected float32, float16 or bfloat16")
        return {name: _tensor(path, name, kind) for name, kind in kinds.items()}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable safetensors file: {one_line(e)}") from None


def _tensor(path: Path, name: str, kind: str) -> np.ndarray:
    """One array of a safetensors file, reopened because an open file retains what was read."""
    with safe_open(path, "flax" if kind == "BF16" else "numpy") as file:  # NumPy lacks bfloat16
        return _float32(np.asarray(file.get_tensor(name)))


def _float32(array: np.ndarray) -> np.ndarray:
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Context of a temporary file beside `path` that replaces it at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written(path: Path | str) -> Iterator[Path]:
    """`replacing`, with UserError for OSError."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror or e}") from e


def write_safetensors(
    path: Path | str, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a file atomically, array by array, without a second copy of the state.

    Raises UserError for other dtypes than DTYPES.
    """
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
            file.write(np.ascontiguousarray(array).data)


def write_torch(path: Path | str, content: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes {key: state dict} atomically with torch.save. Raises UserError without PyTorch, and
    OSError on a full disk."""
    torch_pickle.import_torch(path, "written")
    import torch

    tensors = {
        key: {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
        for key, state in content.items()
    }
    with replacing(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as e:  # on a full disk
            raise OSError(one_line(e)) from e


def read_metadata(path: Path | str) -> dict[str, str]:
    """Metadata of a safetensors file; {} of another file. Raises UserError."""
    path, key = split(path)
    if key is not None or file_kind.kind(path) != "safetensors":
        return {}
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a readable safetensors file: {one_line(e)}") from None


def hash_state(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes in the order of names, 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
