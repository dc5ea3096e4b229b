"""Reading and writing weight files. Nothing here runs code that a file brings along."""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dgpt_jax.schema import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": "F32", "float16": "F16"}  # what is written, by safetensors' names
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def read_state(path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors, .pt, .pth, .bin or .npz file, or of a directory with an INDEX.

    Half precision becomes float32. Raises UserError on anything that is not plain weights.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{path}: weights are read from a local disk, copy them to one")
    path = Path(path)
    if path.is_dir() and (path / INDEX).is_file():
        shards = json.loads((path / INDEX).read_text())["weight_map"].values()
        state: dict[str, np.ndarray] = {}
        for name in sorted(set(shards)):
            if Path(name).name != name:
                raise UserError(f"{path / INDEX} names a shard outside its directory: {name}")
            state |= read_state(path / name)
        return state
    if not path.is_file():
        raise UserError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise UserError(f"{path}: weights are .safetensors, {', '.join(TORCH_SUFFIXES)}, .npz files")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _float32(file[name]) for name in file.files}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is no readable .npz of plain arrays: {_line(e)}") from None


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
        raise UserError(f"{path} is no readable safetensors file: {_line(e)}") from None


def _tensor(path: Path, name: str, kind: str) -> np.ndarray:
    """One array of a safetensors file. Opened anew, since an open file keeps what was read."""
    with safe_open(path, "flax" if kind == "BF16" else "numpy") as file:  # NumPy knows no bfloat16
        return _float32(np.asarray(file.get_tensor(name)))


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read: pip install 'dgpt_jax[torch]', or give safetensors"
        ) from None
    if _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript archive, which brings code: in PyTorch, run `state = "
            f"torch.jit.load({path.name!r}, 'cpu').state_dict()` and save it with "
            f"`safetensors.torch.save_file`, then give that file"
        )
    try:
        # The official D-iGPT files hold the program's arguments, a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} is not plain PyTorch weights: {_line(e)}") from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    half = (torch.float16, torch.bfloat16)
    return {n: (x.float() if x.dtype in half else x).numpy() for n, x in tensors.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def _float32(array: np.ndarray) -> np.ndarray:
    half = array.dtype == np.float16 or array.dtype.name == "bfloat16"
    return array.astype(np.float32) if half else array


def _line(error: Exception) -> str:
    return (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__


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
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be written: pip install 'dgpt_jax[torch]', or name it "
            f".safetensors"
        ) from None
    tensors = {
        key: {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
        for key, state in content.items()
    }
    with replacing(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as e:  # what it makes of a full disk
            raise UserError(f"{path} cannot be written: {_line(e)}") from e


def read_metadata(path) -> dict[str, str]:
    """The metadata of a .safetensors file; none of another. Raises UserError."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is no readable safetensors file: {_line(e)}") from None


def hash_state(state: Mapping[str, np.ndarray]) -> str:
    """16 hex digits of SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
