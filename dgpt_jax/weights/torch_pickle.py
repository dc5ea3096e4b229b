"""Reading state dicts in files by torch.save: plain values only, no code is run."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgpt_jax.errors import UserError, printable

# Keys of a model in training checkpoints; the first that is present is read by default.
KEYS = ("model", "state_dict", "model_state_dict", "module")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # terminal colors
GLOBAL = re.compile(r"Unsupported global: GLOBAL (\S+)")


def read(path: Path, key: str | None = None) -> tuple[dict[str, np.ndarray], str | None, list[str]]:
    """(arrays, their key if there are several state dicts, notes).

    key: of the state dict; None chooses one. Half precision becomes float32. Raises UserError.
    """
    import_torch(path, "read")
    content = _load(path)
    content, selected, notes = _state_dict(content, path, key)
    import torch

    tensors = {name: x.detach() for name, x in content.items() if isinstance(x, torch.Tensor)}
    half = (torch.float16, torch.bfloat16)
    try:
        arrays = {n: (x.float() if x.dtype in half else x).numpy() for n, x in tensors.items()}
    except (TypeError, RuntimeError) as e:  # sparse, quantized or meta tensors
        raise UserError(f"{path} is not plain PyTorch weights: {one_line(e)}") from None
    return arrays, selected, notes


def import_torch(path: Path | str, action: str) -> None:
    """Imports PyTorch; action: "read" or "written". Raises UserError if it is missing."""
    try:
        import torch  # noqa: F401
    except ImportError:
        alternative = "use safetensors" if action == "read" else "name it .safetensors"
        raise UserError(
            f"{path} needs PyTorch to be {action}: pip install 'dgpt_jax[torch]', or {alternative}"
        ) from None


def _load(path: Path) -> Any:
    """Contents of a file. Raises UserError."""
    import torch

    if _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript archive, which contains code: in PyTorch, run `state = "
            f"torch.jit.load({path.name!r}, 'cpu').state_dict()`, save it with "
            f"`safetensors.torch.save_file` and use that file"
        )
    try:
        # Official D-iGPT files contain the program's arguments, a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles not by torch.save
            with path.open("rb") as file:  # given a path, PyTorch checks the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError,
        AttributeError, IndexError, AssertionError,
    ) as e:  # fmt: skip
        code = GLOBAL.search(str(e))
        if code is None:  # PyTorch's own advice for an unreadable pickle is to run it
            pickled = isinstance(e, pickle.UnpicklingError)
            reason = "not a file by torch.save, or damaged" if pickled else one_line(e)
            raise UserError(f"{path} is not plain PyTorch weights: {reason}") from None
        raise UserError(
            f"{path} is not plain PyTorch weights: it contains {printable(code[1])[:100]}, a class "
            f"or function with code. If you trust its source, load it in PyTorch with "
            f"`weights_only=False`, save only the model's `state_dict()` and use that file"
        ) from None


def _state_dict(content: Any, path: Path, key: str | None) -> tuple[Mapping, str | None, list[str]]:
    """(a mapping with tensors, its key if one of several, notes). Raises UserError."""
    candidates = _state_dicts(content)
    if key is not None:
        if key not in candidates:
            nested = " (a key within another cannot be selected)" if "/" in key else ""
            raise UserError(f"{path} has no weights under {key!r}{nested}{_key_list(candidates)}")
        return (*_state_dict(candidates[key], path, None)[:1], key, [])
    if not isinstance(content, Mapping):
        raise UserError(f"{path} contains a {type(content).__name__}, not a state dict")
    selected = next((name for name in KEYS if name in candidates), None)
    if selected is None and _has_tensors(content):
        return content, None, []
    if selected is None and not candidates:
        raise UserError(f"{path} contains no tensors")
    if selected is None and len(candidates) > 1:
        keys = _key_list(candidates)
        raise UserError(f"{path} contains several state dicts{keys}: use {path}#KEY")
    selected = selected or next(iter(candidates))
    state, nested_key, notes = _state_dict(candidates[selected], path, None)
    if len(candidates) == 1:
        return state, nested_key, notes
    others = ", ".join(f"{path}#{printable(name)}" for name in candidates if name != selected)
    return state, selected, [f"{path}: using the weights under {selected}; others are {others}"]


def _state_dicts(content: Any) -> dict[str, Mapping]:
    """Mappings directly below `content` that contain tensors, or such mappings under KEYS."""
    if not isinstance(content, Mapping):
        return {}
    below = {n: x for n, x in content.items() if isinstance(n, str) and isinstance(x, Mapping)}
    return {
        name: value
        for name, value in below.items()
        if _has_tensors(value) or any(inner in KEYS for inner in _state_dicts(value))
    }


def _has_tensors(content: Mapping) -> bool:
    """True if a value with a string key is a tensor."""
    import torch

    return any(isinstance(n, str) and isinstance(x, torch.Tensor) for n, x in content.items())


def _key_list(candidates: Mapping) -> str:
    return f": available keys are {', '.join(map(printable, candidates))}" if candidates else ""


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def one_line(error: Exception) -> str:
    """First line of an error, without terminal colors."""
    text = ESCAPES.sub("", str(error)).strip().split("\n")[0]
    return printable(text)[:200] or type(error).__name__
