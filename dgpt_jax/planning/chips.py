"""What accelerators can do, by their data sheets, and how clouds name slices of them."""

import math
import re
from dataclasses import dataclass

from dgpt_jax.schema import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip. FLOP/s are dense bfloat16's; hbm is what a program can use of it, in bytes; rates
    are bytes/s; ici is what a chip sends over all links to its neighbours, dcn its share of the
    network between slices or hosts. A slice is named after its number of cores or of chips."""

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    ici: float
    dcn: float
    cores_in_name: int = 1
    options: tuple = ()  # of jax's topology description


# FLOP/s, HBM rate, ICI (half of "bidirectional"): cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. v4's
# six links of 50 GB/s each way: Jouppi et al. 2023 (arXiv 2304.01433), table 4. HBM that a program
# can use: what libtpu's compiler says is available. DCN: 50 Gbit/s a v5p chip, 6.4 Tbit/s a v5e pod
# of 256 (the same pages); the others are taken to be as v5e.
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

# Data sheets of the SXM forms: nvidia.com/en-us/data-center/{h100,h200}. NVLink one way; a 400
# Gbit/s network card a GPU.
GPUS = {
    chip.name: chip
    for chip in (
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("h200", 989e12, 141e9, 4800e9, 450e9, 50e9),
    )
}

# How JAX names the kinds of devices; v5p before v5, of which it is a part.
KINDS = {
    "TPU v4": TPUS["v4"], "TPU v5 lite": TPUS["v5e"], "TPU v5e": TPUS["v5e"],
    "TPU v5p": TPUS["v5p"], "TPU v5": TPUS["v5p"], "TPU v6": TPUS["v6e"],
    "H100": GPUS["h100"], "H200": GPUS["h200"],
}  # fmt: skip


def of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or None where it is not known."""
    return next((chip for kind, chip in KINDS.items() if kind in device_kind), None)


@dataclass(frozen=True)
class Topology:
    """`slices` slices of a TPU generation, each of a shape in chips: "v5e:4x4", "4*v5e:16x16"."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        """Shape, chips and the name that clouds give a slice: v4 and v5p count cores."""
        shape = "x".join(map(str, self.shape))
        cores = math.prod(self.shape) * self.chip.cores_in_name
        times = f"{self.slices}*" if self.slices > 1 else ""
        name = f"{self.chip.name}-{cores}"
        return f"{times}{self.chip.name}:{shape} = {self.chips} chips = {times}{name}"


def topology(text: str) -> Topology:
    """Reads "v5e:4x4" or, of several slices, "2*v5e:16x16". Raises UserError."""
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)+)", text)
    if not found or found[2] not in TPUS:
        raise UserError(
            f"cannot read the topology {text!r}: write v5e:4x4, v4:2x2x4 or 2*v5e:16x16; known are "
            f"{', '.join(TPUS)}"
        )
    shape = tuple(int(n) for n in found[3].split("x"))
    return Topology(TPUS[found[2]], shape, int(found[1] or 1))
