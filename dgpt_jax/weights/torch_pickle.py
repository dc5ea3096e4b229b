"""State dicts in files of torch.save, plain values alone: no code of theirs is run."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dgpt_jax.schema import UserError, printable

# Under which keys programs save what they train; the first that is there is taken.
KEYS = ("model", "state_dict", "model_state_dict", "module")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours of a terminal
GLOBAL = re.compile(r"Unsupported global: GLOBAL (\S+)")


def read(path: Path, key: str | None = None) -> tuple[dict[str, np.ndarray], str | None, list[str]]:
    """(arrays, the key that they are under where others are weights too, notes).

    key: under which the weights lie, None: found. Half precision becomes float32. UserError.
    """
    import_torch(path, "read")
    content = _load(path)
    content, taken, notes = _state_dict(content, path, key)
    import torch

    tensors = {name: x.detach() for name, x in content.items() if isinstance(x, torch.Tensor)}
    half = (torch.float16, torch.bfloat16)
    try:
        arrays = {n: (x.float() if x.dtype in half else x).numpy() for n, x in tensors.items()}
    except (TypeError, RuntimeError) as e:  # sparse, quantized, or on no device
        raise UserError(f"{path} is not plain PyTorch weights: {line(e)}") from None
    return arrays, taken, notes


def import_torch(path, what: str):
    """Raises UserError without PyTorch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        other = "give safetensors" if what == "read" else "name it .safetensors"
        raise UserError(
            f"{path} needs PyTorch to be {what}: pip install 'dgpt_jax[torch]', or {other}"
        ) from None


def _load(path: Path):
    """What a file holds. Raises UserError."""
    import torch

    if _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript archive, which brings code: in PyTorch, run `state = "
            f"torch.jit.load({path.name!r}, 'cpu').state_dict()` and save it with "
            f"`safetensors.torch.save_file`, then give that file"
        )
    try:
        # The official D-iGPT files hold the program's arguments, a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are none of torch.save
            with path.open("rb") as file:  # of a path, PyTorch looks at the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError,
        AttributeError, IndexError, AssertionError,
    ) as e:  # fmt: skip
        named = GLOBAL.search(str(e))
        if named is None:  # PyTorch's own advice for a pickle that it cannot read is to run it
            pickled = isinstance(e, pickle.UnpicklingError)
            why = "no file of torch.save, or a damaged one" if pickled else line(e)
            raise UserError(f"{path} is not plain PyTorch weights: {why}") from None
        raise UserError(
            f"{path} is not plain PyTorch weights: it holds {printable(named[1])[:100]}, a class "
            f"or function that brings code. In PyTorch, where its source is trusted, load it with "
            f"`weights_only=False`, save the model's `state_dict()` alone, and give that file"
        ) from None


def _state_dict(content, path: Path, key: str | None) -> tuple[Mapping, str | None, list[str]]:
    """(a mapping with tensors, its key where it was one of several, notes). Raises UserError."""
    found = _weights(content)
    if key is not None:
        if key not in found:
            raise UserError(f"{path} has no weights under {key!r}{_listed(found)}")
        return (*_state_dict(found[key], path, None)[:1], key, [])
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    taken = next((name for name in KEYS if name in found), None)
    if taken is None and _has_tensors(content):
        return content, None, []
    if taken is None and len(found) != 1:
        what = "no tensors" if not found else f"several state dicts{_listed(found)}"
        raise UserError(f"{path} holds {what}" + (f": give {path}#KEY" if found else ""))
    taken = taken or next(iter(found))
    inner, deeper, notes = _state_dict(found[taken], path, None)
    if len(found) == 1:
        return inner, deeper, notes
    others = ", ".join(f"{path}#{printable(name)}" for name in found if name != taken)
    return inner, taken, [f"{path}: its weights under {taken} are taken; others are {others}"]


def _weights(content) -> dict[str, Mapping]:
    """The mappings with tensors, or with such mappings, directly below a mapping."""
    if not isinstance(content, Mapping):
        return {}
    below = {n: x for n, x in content.items() if isinstance(n, str) and isinstance(x, Mapping)}
    return {
        name: value
        for name, value in below.items()
        if _has_tensors(value) or any(inner in KEYS for inner in _weights(value))
    }


def _has_tensors(content: Mapping) -> bool:
    """Whether arrays are among the values, by name."""
    import torch

    return any(isinstance(n, str) and isinstance(x, torch.Tensor) for n, x in content.items())


def _listed(found: Mapping) -> str:
    return f": it has them under {', '.join(map(printable, found))}" if found else ""


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def line(error: Exception) -> str:
    """The first line of an error, without what colours it on a terminal."""
    text = ESCAPES.sub("", str(error)).strip().split("\n")[0]
    return printable(text)[:200] or type(error).__name__
