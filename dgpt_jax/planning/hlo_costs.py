"""HBM traffic, FLOPs and collectives of one call of a compiled program, per device.

XLA's cost analysis counts the body of a loop once and includes operands in on-chip memory. Here
every top-level instruction counts once per iteration of its loop; operands and results count if
they are in HBM, with the size of their tiled layout; slices and in-place updates count the elements
they access. A custom call counts its operands and results but no FLOPs: cost estimates of kernels
are not used.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dgpt_jax.planning.hlo import Array, Computation, Instruction, Program

# Instructions without memory traffic of their own. Of asynchronous pairs, the start is counted.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "while", "conditional", "call",
}  # fmt: skip
FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
MEGASCALE = "_xla_megascale"  # marks libtpu's transfers between slices
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and group size. The compiler splits collectives that span slices into
    some within each slice and one between them."""

    kind: str
    group: int
    dcn: bool  # between slices, over the network
    count: int
    bytes: float  # input of each device, summed over `count`

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a ring algorithm, which has two passes for all-reduce."""
        if self.kind == "collective-permute":
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) / self.group


def bytes_moved(program: Program) -> float:
    """Returns the bytes read from and written to HBM per call of the program."""
    return sum(moved * count for moved, count, _ in traffic(program))


def traffic(program: Program) -> Iterator[tuple[float, int, Instruction]]:
    """Yields (bytes, count, instruction) of every top-level instruction with HBM traffic."""
    for name, count in program.execution_counts().items():
        for instruction in program.computations[name]:
            if moved := _bytes_moved(program, program.computations[name], instruction):
                yield moved, count, instruction


def _bytes_moved(program: Program, computation: Computation, instruction: Instruction) -> float:
    opcode, results = instruction.opcode, instruction.results
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(f'"{call}"' in instruction.text for call in FREE_CALLS):
        return 0
    operands = computation.operands(instruction)
    if opcode == "copy-start":  # results: the copy, the source, a semaphore
        return sum(a.bytes for a in results[:2] if a.in_hbm)
    if opcode == "slice-start":  # results: the source, the slice, a semaphore
        ends = (results[0], results[-2])
        return sum(results[-2].bytes for a in ends if a.in_hbm)
    if opcode in SLICES:
        return sum(results[0].bytes for a in (results[0], operands[0]) if a.in_hbm)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes if results[0].in_hbm else 0
    if opcode != "fusion":
        return sum(a.bytes for a in (*results, *operands) if a.in_hbm)
    fused = program.computations[instruction.attribute("calls")]
    reads = (
        _bytes_read(program, fused, fused.parameter(i), operand.bytes)
        for i, operand in enumerate(operands)
        if operand.in_hbm
    )
    return sum(reads) + _bytes_written(program, fused, fused.root, results)


def _bytes_read(program: Program, fused: Computation, name: str, size: float) -> float:
    """Bytes of `name` that a fusion reads: less than its size if only slices are used."""
    total = 0.0
    for user, index in fused.users(name):
        if user.opcode in SLICES and index == 0:
            total += user.results[0].bytes
        elif user.opcode == "dynamic-update-slice" and index == 0:
            total += 0
        elif user.opcode == "bitcast":
            total += _bytes_read(program, fused, user.name, size)
        elif user.opcode == "fusion":
            nested = program.computations[user.attribute("calls")]
            total += _bytes_read(program, nested, nested.parameter(index), size)
        else:
            return size
    return min(total, size)


def _bytes_written(
    program: Program, fused: Computation, root: Instruction, results: Sequence[Array]
) -> float:
    """Bytes that a fusion writes: only the update of an in-place update."""
    if root.opcode == "tuple":
        roots = [fused.instructions[name] for name in root.operands]
        pairs = zip(roots, results, strict=True)
        return sum(_bytes_written(program, fused, root, (array,)) for root, array in pairs)
    if not results[0].in_hbm:
        return 0
    while root.opcode == "bitcast":
        root = fused.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return fused.instructions[root.operands[1]].results[0].bytes
    return sum(a.bytes for a in results if a.in_hbm)


def flops(program: Program) -> float:
    """Returns the FLOPs of all matrix products, two per multiply-add, without those in kernels."""

    def computation_flops(name: str) -> float:
        total = 0.0
        for instruction in program.computations[name]:
            if instruction.opcode in ("dot", "convolution"):
                total += _product_flops(program.computations[name], instruction)
            elif instruction.opcode == "fusion":
                total += computation_flops(instruction.attribute("calls"))
        return total

    counts = program.execution_counts().items()
    return sum(computation_flops(name) * count for name, count in counts)


def collectives(program: Program) -> list[Collective]:
    """Returns the collectives of a call of the program by kind and group size, largest first.

    A collective that the compiler spreads over several fusions, to overlap it with them, keeps its
    channel and shape, and counts once.
    """
    totals: dict[tuple[str, int, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, count in program.execution_counts().items():
        unique = {_identity(i): (parent, i) for parent, i in _collectives_in(program, name)}
        for parent, instruction in unique.values():
            operands = program.computations[parent].operands(instruction)
            kind, group, dcn = _classify(parent, instruction)
            size = sum(a.bytes for a in operands)
            totals[kind, group, dcn][0] += count
            totals[kind, group, dcn][1] += count * size * (group if kind == "all-gather" else 1)
    result = [Collective(*key, int(n), b) for key, (n, b) in totals.items() if key[1] > 1]
    return sorted(result, key=lambda c: -c.bytes)


def _collectives_in(program: Program, name: str) -> Iterator[tuple[str, Instruction]]:
    """Yields (parent computation, collective) of a computation and its fusions."""
    for instruction in program.computations[name]:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES or (opcode == "send" and MEGASCALE in instruction.text):
            yield name, instruction
        elif opcode in ("fusion", "async"):
            yield from _collectives_in(program, instruction.attribute("calls"))


def _identity(instruction: Instruction) -> tuple:
    shapes = tuple((a.dtype, a.dims) for a in instruction.results)
    channel = re.search(r"\bchannel_id=(\d+)", instruction.text)
    return instruction.opcode, shapes, channel[1] if channel else instruction.name


def _classify(parent: str, instruction: Instruction) -> tuple[str, int, bool]:
    """Returns (kind, group size, between slices). The TPU compiler emits reduce-scatter as a fusion
    of an all-reduce and a slice, named all-reduce-scatter."""
    if parent.startswith("all-reduce-scatter"):
        return "reduce-scatter", _group_size(instruction.text), False
    if instruction.opcode == "send":
        slices = _search(rf'{MEGASCALE}_target="\{{([\d,]+)\}}', instruction.text)
        kind = "all-reduce" if f"{MEGASCALE}_reduce_operation" in instruction.text else "all-gather"
        return kind, slices[1].count(",") + 1, True
    return instruction.opcode.removesuffix("-start"), _group_size(instruction.text), False


def _group_size(text: str) -> int:
    """Devices per group of replica_groups={{0,1},{2,3}}, [2,2]<=[4] or mesh['x'=2,'y'=2] {'y'} (or
    a sub-axis 'y':(1)2); 2 for the pairs of a permute."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(sub_axis or sizes[axis]) for axis, sub_axis in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    return 2 if "source_target_pairs" in text else 1


def _search(pattern: str, text: str) -> re.Match[str]:
    """Returns the match of a pattern that must occur."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text[:200]}")
    return match


def _product_flops(computation: Computation, product: Instruction) -> float:
    """FLOPs of a dot or convolution."""
    out = product.results[0].dims
    left, right = (a.dims for a in computation.operands(product))
    if product.opcode == "dot":
        contracted = _search(r"lhs_contracting_dims=\{([\d,]*)\}", product.text)[1]
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    labels = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
    image, kernel, result = (dict(zip(text, range(9))) for text in labels.groups())
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)", product.text))
    positions = 1
    for axis in (c for c in image if c.isdigit()):
        options = {key: value.split("x")[int(axis)] for key, value in window.items()}
        positions *= _positions(
            left[image[axis]], right[kernel[axis]], out[result[axis]],
            stride=int(options.get("stride", 1)), low=int(options.get("pad", "0_0").split("_")[0]),
            lhs_dilation=int(options.get("lhs_dilate", 1)),
            rhs_dilation=int(options.get("rhs_dilate", 1)),
        )  # fmt: skip
    groups = re.search(r"batch_group_count=(\d+)", product.text)
    batch = out[result["b"]] / (1 if groups is None else int(groups[1]))
    return 2 * batch * out[result["f"]] * right[kernel["i"]] * positions


def _positions(
    image: int, kernel: int, out: int, *, stride: int, low: int, lhs_dilation: int,
    rhs_dilation: int,
) -> int:  # fmt: skip
    """Number of (output, kernel) positions along an axis that read an input element, not padding or
    dilation: few in the convolution to which a batched product is compiled."""
    return sum(
        0 <= (i := o * stride + k * rhs_dilation - low) < (image - 1) * lhs_dilation + 1
        and i % lhs_dilation == 0
        for o in range(out)
        for k in range(kernel)
    )
