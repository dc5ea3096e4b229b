"""Parser of optimized HLO text (`compiled.as_text()`)."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2}
ITEM_BYTES |= {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)}

ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Array:
    """Type, shape and layout of an array: f32[16,128]{1,0:T(8,128)}."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """True unless the memory space is S(1) or above: on-chip memory and semaphores."""
        return "S(" not in self.layout

    @property
    def bytes(self) -> float:
        """Size in memory, with dimensions padded to multiples of the first tile."""
        order, _, tiles = self.layout.partition(":")
        minor_to_major = [int(i) for i in order.split(",")] if order else range(len(self.dims))
        sizes = [self.dims[i] for i in minor_to_major]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        for i, t in enumerate(reversed([int(t) for t in tile[1].split(",")]) if tile else ()):
            if i < len(sizes):
                sizes[i] = math.ceil(sizes[i] / t) * t
        return math.prod(sizes) * ITEM_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. results: arrays, tuples flattened. operands: names."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Returns "loop" for the attribute body=%loop. Raises ValueError if it is absent."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        if match is None:
            raise ValueError(f"{self.name} has no attribute {name}")
        return match[1]


@dataclass
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """The instruction with the result."""
        return next(i for i in self if i.is_root)

    def operands(self, instruction: Instruction) -> list[Array]:
        """Operand arrays of an instruction, tuples flattened."""
        return [a for name in instruction.operands for a in self.instructions[name].results]

    def parameter(self, number: int) -> str:
        """Returns the name of a parameter."""
        return next(i.name for i in self if f" parameter({number})" in i.text)

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """Yields (instruction, operand index) for each use of `name`."""
        for instruction in self:
            for i, operand in enumerate(instruction.operands):
                if operand == name:
                    yield instruction, i


class Program:
    """Computations by name, and the name of the entry computation."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        current = None
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = self.computations[header[2]] = Computation()
                if header[1]:
                    self.entry = header[2]
            elif current is not None and (instruction := _parse_instruction(line)):
                current.instructions[instruction.name] = instruction

    def execution_counts(self) -> dict[str, int]:
        """Returns the executions of each computation outside fusions per call of the program."""
        counts: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int):
            counts[name] += count
            for instruction in self.computations[name].instructions.values():
                if instruction.opcode == "while":
                    visit(instruction.attribute("body"), count * self._trip_count(instruction))
                elif instruction.opcode == "call":
                    visit(instruction.attribute("to_apply"), count)

        visit(self.entry, 1)
        return dict(counts)

    def _trip_count(self, loop: Instruction) -> int:
        """Trip count of a loop from 0 to a constant, the form of jax.lax.scan."""
        condition = self.computations[loop.attribute("condition")]
        matches = [re.search(r" s32\[\]\S* constant\((\d+)\)", i.text) for i in condition]
        bounds = [int(match[1]) for match in matches if match]
        if len(bounds) != 1:
            raise ValueError(f"loop {loop.name} does not count up to a constant")
        return bounds[0]


def _parse_instruction(line: str) -> Instruction | None:
    head = INSTRUCTION.match(line)
    if not head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing_parenthesis(rest) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    operands = rest[: _closing_parenthesis("(" + rest) - 1]
    return Instruction(
        name=head[2],
        opcode=opcode,
        results=tuple(
            Array(dtype, tuple(map(int, filter(None, dims.split(",")))), layout or "")
            for dtype, dims, layout in ARRAY.findall(types)
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        text=line,
        is_root=bool(head[1]),
    )


def _closing_parenthesis(text: str) -> int:
    """Index of the parenthesis that closes the one at index 0."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis: {text[:80]}")
