"""Peak rates of accelerators, from data sheets, and names of TPU slices."""

import math
import re
from dataclasses import dataclass

from dgpt_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Data sheet of a chip."""

    name: str
    flops: float  # FLOP/s, dense bfloat16
    hbm: float  # bytes that a program can use
    hbm_rate: float  # bytes/s
    ici: float  # bytes/s sent over all links to neighbors
    dcn: float  # bytes/s, the chip's share of the network between slices or hosts
    cores_in_name: int = 1  # per chip: slices are named by cores or by chips
    options: tuple[tuple[str, str], ...] = ()  # of JAX's topology description


# FLOP/s, HBM rate, ICI (half of "bidirectional"): cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. v4's
# six links of 50 GB/s each way: Jouppi et al. 2023 (arXiv 2304.01433), table 4. Usable HBM: as
# reported by libtpu's compiler. DCN: 50 Gbit/s per v5p chip, 6.4 Tbit/s per v5e pod of 256 (same
# pages); assumed equal to v5e for the others.
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1200e9, 300e9, 3.1e9, 2,
             (("chip_config_name", "megacore"),)),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 3.1e9),
        Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9, 2),
        Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 400e9, 3.1e9),
    )
}  # fmt: skip

# SXM data sheets: nvidia.com/en-us/data-center/{h100,h200}. NVLink one way; one 400 Gbit/s network
# card per GPU.
GPUS = {
    chip.name: chip
    for chip in (
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("h200", 989e12, 141e9, 4800e9, 450e9, 50e9),
    )
}

# By substring of jax.Device.device_kind; v5p before its prefix v5.
KINDS = {
    "TPU v4": TPUS["v4"], "TPU v5 lite": TPUS["v5e"], "TPU v5e": TPUS["v5e"],
    "TPU v5p": TPUS["v5p"], "TPU v5": TPUS["v5p"], "TPU v6": TPUS["v6e"],
    "H100": GPUS["h100"], "H200": GPUS["h200"],
}  # fmt: skip


def of(device_kind: str) -> Chip | None:
    """Returns the chip of a jax.Device.device_kind, or None."""
    return next((chip for kind, chip in KINDS.items() if kind in device_kind), None)


@dataclass(frozen=True)
class Topology:
    """Slices of a TPU generation and their shape in chips: "v5e:4x4", "4*v5e:16x16"."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        """Shape, number of chips and Google Cloud's name, which counts cores of v4 and v5p."""
        shape = "x".join(map(str, self.shape))
        cores = math.prod(self.shape) * self.chip.cores_in_name
        prefix = f"{self.slices}*" if self.slices > 1 else ""
        name = f"{self.chip.name}-{cores}"
        return f"{prefix}{self.chip.name}:{shape} = {self.chips} chips = {prefix}{name}"


def topology(text: str) -> Topology:
    """Parses "v5e:4x4" or, for several slices, "2*v5e:16x16". Raises UserError if invalid."""
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", text)
    if not match or match[2] not in TPUS:
        raise UserError(
            f"invalid topology {text!r}: write v5e:4x4, v4:2x2x4 or 2*v5e:16x16; TPUs: "
            f"{', '.join(TPUS)}"
        )
    shape = tuple(int(n) for n in match[3].split("x"))
    return Topology(TPUS[match[2]], shape, int(match[1] or 1))
