"""An optimised HLO program, read from its text (`compiled.as_text()`)."""

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
    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_hbm(self) -> bool:
        """S(1) and above are on-chip memory and semaphores."""
        return "S(" not in self.layout

    @property
    def bytes(self) -> float:
        """Size in memory: the dimensions of the first tile are padded to multiples of it."""
        order, _, tiles = self.layout.partition(":")
        minor_first = [int(i) for i in order.split(",")] if order else range(len(self.dims))
        sizes = [self.dims[i] for i in minor_first]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        for i, t in enumerate(reversed([int(t) for t in tile[1].split(",")]) if tile else ()):
            if i < len(sizes):
                sizes[i] = math.ceil(sizes[i] / t) * t
        return math.prod(sizes) * ITEM_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """`%body` of `body=%body`, without the percent sign."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return next(i for i in self if i.is_root)

    def operands(self, instruction: Instruction) -> list[Array]:
        """What an instruction of this computation reads; of tuples, all their arrays."""
        return [a for name in instruction.operands for a in self.instructions[name].results]

    def parameter(self, number: int) -> str:
        """The name of a parameter."""
        return next(i.name for i in self if f" parameter({number})" in i.text)

    def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """Instructions that read `name`, and as which operand."""
        for instruction in self:
            for i, operand in enumerate(instruction.operands):
                if operand == name:
                    yield instruction, i


class Program:
    """Computations by name, and which of them is the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        current = None
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = self.computations[header[2]] = Computation()
                if header[1]:
                    self.entry = header[2]
            elif current is not None and (found := _instruction(line)):
                current.instructions[found.name] = found

    def times(self) -> dict[str, int]:
        """How often each computation outside of fusions runs in a call of the program."""
        times: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int):
            times[name] += count
            for instruction in self.computations[name].instructions.values():
                if instruction.opcode == "while":
                    visit(instruction.attribute("body"), count * self._rounds(instruction))
                elif instruction.opcode == "call":
                    visit(instruction.attribute("to_apply"), count)

        visit(self.entry, 1)
        return dict(times)

    def _rounds(self, loop: Instruction) -> int:
        """Rounds of a loop that counts from 0 to a constant, as jax.lax.scan makes them."""
        condition = self.computations[loop.attribute("condition")]
        found = [re.search(r" s32\[\]\S* constant\((\d+)\)", i.text) for i in condition]
        bounds = [int(match[1]) for match in found if match]
        if len(bounds) != 1:
            raise ValueError(f"the loop {loop.name} does not count up to one constant")
        return bounds[0]


def _instruction(line: str) -> Instruction | None:
    head = INSTRUCTION.match(line)
    if not head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    inner = rest[: _closing("(" + rest) - 1]
    return Instruction(
        name=head[2],
        opcode=opcode,
        results=tuple(
            Array(dtype, tuple(map(int, filter(None, dims.split(",")))), layout or "")
            for dtype, dims, layout in ARRAY.findall(kind)
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", inner)),
        text=line,
        is_root=bool(head[1]),
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that the text begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis: {text[:80]}")
