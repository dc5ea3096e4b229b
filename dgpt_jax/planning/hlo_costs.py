"""What a compiled program moves, computes and communicates in a call, on one device.

XLA's own cost analysis counts the body of a loop once, however often it runs, and counts operands
that never leave on-chip memory. Here every top-level instruction counts as often as its loop runs;
its operands and results count where they lie in HBM, at the size of their tiled layout; a slice,
or an update in place, counts as what it touches. A custom call counts its operands and results, and
no FLOPs: what a kernel claims for itself is not used.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from dgpt_jax.hlo import Computation, Instruction, Program

# Instructions that move nothing: names for what is there already, and the ends of asynchronous
# pairs, whose starts are counted.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "while", "conditional", "call",
}  # fmt: skip
FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
MEGASCALE = "_xla_megascale"  # marks what libtpu sends between slices
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """One kind of collective over groups of one size: `bytes` that each device gives to it in all.

    `dcn`: between slices, through the network; the compiler splits what spans slices into parts
    within each and a part between them.
    """

    kind: str
    group: int
    dcn: bool
    count: int
    bytes: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, around a ring: twice for an all-reduce."""
        if self.kind == "collective-permute":
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) / self.group


def bytes_moved(program: Program) -> float:
    """Bytes read from and written to HBM in a call of the program."""
    return sum(moved * count for moved, count, _ in traffic(program))


def traffic(program: Program) -> Iterator[tuple[float, int, Instruction]]:
    """(bytes, times, instruction) of every top-level instruction that moves something."""
    for name, count in program.times().items():
        for instruction in program.computations[name]:
            if moved := _moved(program, program.computations[name], instruction):
                yield moved, count, instruction


def _moved(program: Program, inside: Computation, instruction: Instruction) -> float:
    opcode, results = instruction.opcode, instruction.results
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(f'"{call}"' in instruction.text for call in FREE_CALLS):
        return 0
    operands = inside.operands(instruction)
    if opcode == "copy-start":  # results: the copy, what is copied, a semaphore
        return sum(a.bytes for a in results[:2] if a.in_hbm)
    if opcode == "slice-start":  # results: what is cut from, the cut, a semaphore
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
        _read(program, fused, fused.parameter(i), operand.bytes)
        for i, operand in enumerate(operands)
        if operand.in_hbm
    )
    return sum(reads) + _written(program, fused, fused.root, results)


def _read(program: Program, fused: Computation, name: str, whole: float) -> float:
    """Bytes of `name` that a fusion reads: less than the whole where only slices are used."""
    total = 0.0
    for user, place in fused.users(name):
        if user.opcode in SLICES and place == 0:
            total += user.results[0].bytes
        elif user.opcode == "dynamic-update-slice" and place == 0:
            total += 0
        elif user.opcode == "bitcast":
            total += _read(program, fused, user.name, whole)
        elif user.opcode == "fusion":
            nested = program.computations[user.attribute("calls")]
            total += _read(program, nested, nested.parameter(place), whole)
        else:
            return whole
    return min(total, whole)


def _written(program: Program, fused: Computation, root: Instruction, results) -> float:
    """Bytes that a fusion writes: of an update in place only the update."""
    if root.opcode == "tuple":
        parts = [fused.instructions[name] for name in root.operands]
        return sum(_written(program, fused, p, (r,)) for p, r in zip(parts, results, strict=True))
    if not results[0].in_hbm:
        return 0
    while root.opcode == "bitcast":
        root = fused.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return fused.instructions[root.operands[1]].results[0].bytes
    return sum(a.bytes for a in results if a.in_hbm)


def flops(program: Program) -> float:
    """FLOPs of all matrix products, two a multiply-add; those inside kernels are not seen."""

    def of(name: str) -> float:
        total = 0.0
        for instruction in program.computations[name]:
            if instruction.opcode in ("dot", "convolution"):
                total += _product_flops(program.computations[name], instruction)
            elif instruction.opcode == "fusion":
                total += of(instruction.attribute("calls"))
        return total

    return sum(of(name) * count for name, count in program.times().items())


def collectives(program: Program) -> list[Collective]:
    """The collectives of a call of the program, by kind and group size, largest first.

    One that the compiler spread over several fusions, to overlap it with them, keeps its channel
    and shape and counts once.
    """
    found: dict[tuple[str, int, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, count in program.times().items():
        once = {_identity(i): (inside, i) for inside, i in _collectives_within(program, name)}
        for inside, instruction in once.values():
            operands = program.computations[inside].operands(instruction)
            kind, group, dcn = _described(inside, instruction)
            given = sum(a.bytes for a in operands)
            found[kind, group, dcn][0] += count
            found[kind, group, dcn][1] += count * given * (group if kind == "all-gather" else 1)
    made = [Collective(*key, int(n), b) for key, (n, b) in found.items() if key[1] > 1]
    return sorted(made, key=lambda c: -c.bytes)


def _collectives_within(program: Program, name: str) -> Iterator[tuple[str, Instruction]]:
    """(name of its computation, collective) of a computation and of its fusions."""
    for instruction in program.computations[name]:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES or (opcode == "send" and MEGASCALE in instruction.text):
            yield name, instruction
        elif opcode in ("fusion", "async"):
            yield from _collectives_within(program, instruction.attribute("calls"))


def _identity(instruction: Instruction) -> tuple:
    shapes = tuple((a.dtype, a.dims) for a in instruction.results)
    channel = re.search(r"\bchannel_id=(\d+)", instruction.text)
    return instruction.opcode, shapes, channel[1] if channel else instruction.name


def _described(inside: str, instruction: Instruction) -> tuple[str, int, bool]:
    """(kind, devices a group, whether it goes between slices). The TPU compiler writes a
    reduce-scatter as a fusion of this name, of an all-reduce and a slice."""
    if inside.startswith("all-reduce-scatter"):
        return "reduce-scatter", _group_size(instruction.text), False
    if instruction.opcode == "send":
        slices = re.search(rf'{MEGASCALE}_target="\{{([\d,]+)\}}', instruction.text)
        kind = "all-reduce" if f"{MEGASCALE}_reduce_operation" in instruction.text else "all-gather"
        return kind, slices[1].count(",") + 1, True
    return instruction.opcode.removesuffix("-start"), _group_size(instruction.text), False


def _group_size(text: str) -> int:
    """Devices a group, of replica_groups={{0,1},{2,3}}, [2,2]<=[4] or mesh['x'=2,'y'=2] {'y'} (a
    part of an axis is 'y':(1)2); 2 for the pairs of a permute."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    return 2 if "source_target_pairs" in text else 1


def _product_flops(inside: Computation, product: Instruction) -> float:
    out = product.results[0].dims
    left, right = (a.dims for a in inside.operands(product))
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.text)[1]
        return 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
    image, kernel, result = (dict(zip(text, range(9))) for text in labels.groups())
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)", product.text))
    positions = 1
    for axis in (c for c in image if c.isdigit()):
        given = {key: value.split("x")[int(axis)] for key, value in window.items()}
        positions *= _positions(
            left[image[axis]], right[kernel[axis]], out[result[axis]],
            stride=int(given.get("stride", 1)), low=int(given.get("pad", "0_0").split("_")[0]),
            image_step=int(given.get("lhs_dilate", 1)), kernel_step=int(given.get("rhs_dilate", 1)),
        )  # fmt: skip
    groups = re.search(r"batch_group_count=(\d+)", product.text)
    batch = out[result["b"]] / (1 if groups is None else int(groups[1]))
    return 2 * batch * out[result["f"]] * right[kernel["i"]] * positions


def _positions(image, kernel, out, *, stride, low, image_step, kernel_step) -> int:
    """Pairs of an output and a kernel position along one axis that meet a real input element: a
    batched product is compiled to a convolution whose padding and dilation leave few."""
    return sum(
        0 <= (at := o * stride + k * kernel_step - low) < (image - 1) * image_step + 1
        and at % image_step == 0
        for o in range(out)
        for k in range(kernel)
    )
