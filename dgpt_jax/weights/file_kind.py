"""Format of a weights file by its first bytes, whatever its suffix."""

import zipfile
from pathlib import Path

from dgpt_jax.errors import UserError
from dgpt_jax.weights.config_json import LFS_HEADER

SUPPORTED = "supported are .safetensors, .pt, .pth, .bin, .ckpt and .npz files"
# For a damaged file with an unknown header: the reader that reports the damage.
SUFFIXES = {
    ".safetensors": "safetensors", ".npz": "npz", ".pt": "torch", ".pth": "torch",
    ".bin": "torch", ".ckpt": "torch", ".tar": "torch",
}  # fmt: skip


def kind(path: Path) -> str:
    """ "safetensors", "torch", "npz", or "index" (JSON that names shards). Raises UserError."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        return "npz" if _is_npz(path) else "torch"
    if head[:1] == b"\x80":  # a pickle, as torch.save wrote it before version 1.6
        return "torch"
    if head.lstrip()[:1] in (b"{", b"["):
        return "index"
    if head.startswith(LFS_HEADER):
        reason = "is a git-LFS pointer, not the file: run `git lfs pull` there"
    elif head.lstrip()[:1] == b"<":
        reason = "is a web page, not the file: download the file itself"
    elif not head:
        reason = "is empty: download it again"
    elif path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    else:
        reason = "is not a weights file"
    raise UserError(f"{path} {reason}; {SUPPORTED}")


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return SUFFIXES.get(path.suffix) == "npz"
