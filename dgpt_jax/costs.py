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

import numpy as np

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
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """One kind of collective over groups of one size: `bytes` that each device gives to it.

    `reach`: how far apart the members of a group are in the order of the mesh, at most.
    """

    kind: str
    group: int
    reach: int
    count: int
    bytes: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, around a ring."""
        return self.sent_around(self.group)

    def sent_around(self, members: int) -> float:
        """The same for a ring of so many: twice for an all-reduce, and a permute sends all."""
        if self.kind == "collective-permute":
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (members - 1) / members


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
    operands = [inside.instructions[name].results for name in instruction.operands]
    if opcode == "copy-start":  # results: the copy, what is copied, a semaphore
        return sum(a.bytes for a in results[:2] if a.in_hbm)
    if opcode == "slice-start":  # results: what is cut from, the cut, a semaphore
        ends = (results[0], results[-2])
        return sum(results[-2].bytes for a in ends if a.in_hbm)
    if opcode in SLICES:
        return sum(results[0].bytes for a in (results[0], operands[0][0]) if a.in_hbm)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1][0].bytes if results[0].in_hbm else 0
    if opcode != "fusion":
        return sum(a.bytes for a in (*results, *sum(operands, ())) if a.in_hbm)
    fused = program.computations[instruction.attribute("calls")]
    reads = (
        _read(program, fused, fused.parameter(i), operand[0].bytes)
        for i, operand in enumerate(operands)
        if operand[0].in_hbm
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

    One that the compiler spread over several fusions, to overlap it with them, keeps its
    channel and counts once.
    """
    found: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, count in program.times().items():
        by_channel = {
            _attribute_number(i.text, "channel_id") or i.name: (inside, i)
            for inside, i in _collectives_within(program, name)
        }
        for inside, instruction in by_channel.values():
            kind = instruction.opcode.removesuffix("-start")
            operands = (inside.instructions[n] for n in instruction.operands)
            members = _group(instruction.text)
            given = sum(a.bytes for operand in operands for a in operand.results)
            entry = found[kind, len(members), max(members) - min(members) + 1]
            entry[0] += count
            entry[1] += count * given * (len(members) if kind == "all-gather" else 1)
    made = [Collective(*key, int(n), b) for key, (n, b) in found.items() if key[1] > 1]
    return sorted(made, key=lambda c: -c.bytes)


def _collectives_within(program: Program, name: str) -> Iterator[tuple[Computation, Instruction]]:
    inside = program.computations[name]
    for instruction in inside:
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            yield inside, instruction
        elif instruction.opcode in ("fusion", "async-start"):
            yield from _collectives_within(program, instruction.attribute("calls"))


def _attribute_number(text: str, name: str) -> int | None:
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else None


def _group(text: str) -> list[int]:
    """The first of the groups of replica_groups, as places in the order of devices. Written as
    {{0,1},{2,3}}; as [2,2]<=[4], rows of an array of all; or as mesh['x'=2,'y'=4] {'x','y':(1)2},
    axes of a mesh or parts of them, here the first two of four. A permute's pairs are groups."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        take = dict.fromkeys(sizes, slice(1))
        for axis, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2]):
            step = sizes[axis] // (int(before) * int(part)) if part else 1
            take[axis] = slice(0, step * int(part) if part else sizes[axis], step)
        return [int(place) for place in places[tuple(take.values())].flat]
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = [int(n) for n in found[2].split(",")]
        order = [int(n) for n in found[3].split(",")] if found[3] else range(len(shape))
        places = np.arange(math.prod(shape)).reshape(shape).transpose(tuple(order))
        return [int(place) for place in places.flat[: int(found[1])]]
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return [int(n) for n in found[1].split(",")]
    return [0]


def _product_flops(inside: Computation, product: Instruction) -> float:
    out = product.results[0].dims
    left, right = (inside.instructions[name].results[0].dims for name in product.operands)
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
