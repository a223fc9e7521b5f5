"""What XLA's text of a program says of its traffic: collectives, and bytes by part of the algorithm.

A part is the outermost name scope of trainer_module.moco that an operation was traced in. It needs no library, so that
it runs in any of the environments.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

OTHER = "other"
# What the parts of the algorithm are called in a report.
PARTS = {
    "momentum_update": "f_k follows f_q",
    "key_shuffle": "key views to their shuffled places",
    "key_encoder": "f_k",
    "key_return": "keys back, to everyone",
    "query_encoder": "f_q forward",
    "loss": "logits, softmax and loss",
    "backward": "f_q and loss, backward",
    "gradients": "gradients averaged over the cores",
    "batch_norm": "statistics of the global batch, for `sync`",
    "statistics": "BN running statistics averaged over the cores",
    "sgd": "SGD",
    "enqueue": "keys into the queue",
    "metrics": "metrics",
    OTHER: "what the compiler added, or names no part",
}
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<op>[a-z][\w-]*)\((?P<operands>.*?)\)")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_TILE = re.compile(r"T\((?P<sides>[\d,]+)\)")  # the outer one; what is in it divides it
_SCOPE = re.compile(r'op_name="(?P<name>[^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(?P<count>\d+)"')
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
        dtype: XLA's name.
        size: elements.
        padded: elements with the padding of the tiles that it is kept in.
        in_hbm: false for what the compiler keeps on the chip, near the units.
    """

    dtype: str
    size: int
    padded: int
    in_hbm: bool

    @property
    def bytes(self) -> float:
        """Without padding."""
        return self.size * _BYTES.get(self.dtype, 0)

    @property
    def kept_bytes(self) -> float:
        """With padding: 64 bfloat16 channels in tiles of 8 x 128 take as much as 128."""
        return self.padded * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name, op: as in the text.
        arrays: of its result.
        operands: names.
        scope: the name that TensorFlow gave the operation it came from; empty if none.
        groups: of a collective, cores that take part in one.
        cycles: of a core, as the compiler estimates it; 0 where it says nothing, as of collectives and moves.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    scope: str
    groups: int
    cycles: int

    @property
    def part(self) -> str:
        """Of the algorithm, or "" if nothing tells."""
        return part_of(self.scope, collective=self.kind is not None)

    @property
    def kind(self) -> str | None:
        """Of a collective."""
        base = self.op.removesuffix("-start")
        return base if base in _KINDS else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """What cores exchange at one place of the algorithm, by one kind of collective.

    Attributes:
        kind: XLA's name.
        part: of the algorithm.
        count: collectives in the program that carry it.
        bytes: of one core's result.
        received: bytes that a core receives, if the exchange goes round a ring: of B bytes over R cores an all-reduce
            takes 2 B (R - 1) / R, an all-gather, a reduce-scatter (of its operand) and an all-to-all B (R - 1) / R, a
            permutation B.
    """

    kind: str
    part: str
    count: int
    bytes: int
    received: int


def part_of(scope: str, *, collective: bool = False) -> str:
    """The part of the algorithm that a name such as "gradient_tape/loss/mul" belongs to, or ""."""
    parts = scope.split("/")
    if "batch_norm" in parts and collective:
        return "batch_norm"
    if parts[0] == "gradient_tape" or (parts[0] == "gradients" and not collective):
        return "backward"
    first = re.sub(r"_\d+$", "", parts[0])
    return first if first in PARTS else ""


def instructions(text: str, *, entry_only: bool = False) -> Iterator[Instruction]:
    """The lines of a module's text that are instructions.

    Args:
        text: of the module.
        entry_only: leave out the computations that others call.
    """
    inside = not entry_only
    for line in text.splitlines():
        if line.startswith("ENTRY"):
            inside = True
        elif line.startswith("}") and entry_only:
            inside = False
        match = _INSTRUCTION.match(line) if inside else None
        if match:
            scope, cycles = _SCOPE.search(line), _CYCLES.search(line)
            # Slices that lie side by side already are one array.
            op = "bitcast" if 'custom_call_target="ConcatBitcast"' in line else match["op"]
            yield Instruction(
                match["name"],
                op,
                tuple(_arrays(match["shape"])),
                tuple(re.findall(r"%([\w.-]+)", match["operands"])),
                scope["name"] if scope else "",
                _group_size(line),
                int(cycles["count"]) if cycles else 0,
            )


def _arrays(shape: str) -> Iterator[Array]:
    for match in _ARRAY.finditer(shape):
        sides, layout = [int(side) for side in match["dims"].split(",") if side], match["layout"] or ""
        yield Array(match["dtype"], math.prod(sides), math.prod(_padded(sides, layout)), "S(" not in layout)


def _padded(sides: list[int], layout: str) -> list[int]:
    """Sides, the innermost first, as they are kept by a layout such as "2,0,1:T(8,128)(2,1)"."""
    tile = _TILE.search(layout)
    if not tile:
        return sides
    kept = [sides[int(axis)] for axis in layout.partition(":")[0].split(",") if axis]
    for axis, side in enumerate(reversed(tile["sides"].split(","))):
        if axis < len(kept):
            kept[axis] = -(-kept[axis] // int(side)) * int(side)
    return kept


def _group_size(line: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    return 0


def collectives(lowered: str, compiled: str, cores: int) -> list[Collective]:
    """The collectives of a compiled program.

    The compiler merges sums of different parts; what was merged is told apart by the types and sizes that the program
    had before.

    Args:
        lowered, compiled: text of the program before and after.
        cores: that run it.
    """
    waiting: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for instruction in instructions(lowered):
        if instruction.kind:
            for array in instruction.arrays:
                waiting[array.dtype, array.size].append(instruction.part or OTHER)
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for instruction in instructions(compiled):
        if kind := instruction.kind:
            groups = instruction.groups or cores
            seen = set()
            for array in _exchanged(instruction):
                part = _take(waiting[array.dtype, array.size], instruction.part) or instruction.part or OTHER
                total = totals[kind, part]
                total[0] += part not in seen
                total[1] += array.bytes
                total[2] += array.bytes * _received_share(kind, groups)
                seen.add(part)
    order = list(PARTS)
    return [
        Collective(kind, part, int(count), int(size), round(received))
        for (kind, part), (count, size, received) in sorted(totals.items(), key=lambda i: (order.index(i[0][1]), i[0]))
    ]


def _exchanged(instruction: Instruction) -> Sequence[Array]:
    """The arrays that a core has in the end; an asynchronous start lists what it began with and its flags, too."""
    arrays = instruction.arrays
    if instruction.op.endswith("-start") and instruction.kind in ("all-gather", "collective-permute"):
        return arrays[1:2]
    return arrays


def _take(candidates: list[str], preferred: str) -> str:
    if not candidates:
        return ""
    return candidates.pop(candidates.index(preferred) if preferred in candidates else 0)


def _received_share(kind: str, cores: int) -> float:
    """Bytes that a core receives for each byte of its result."""
    share = (cores - 1) / cores
    return {
        "all-reduce": 2 * share,
        "all-gather": share,
        "reduce-scatter": cores - 1.0,  # of the operand, cores times the result, the share
        "all-to-all": share,
        "collective-permute": 1.0,
    }[kind]


def bytes_by_part(compiled: str, *, hbm_only: bool = False) -> Mapping[str, int]:
    """Bytes that the operations of each part read and write, by our own count.

    With the tiles' padding, without what loops repeat. The sum is less than XLA's "bytes accessed", which takes a move
    into a core's own memory for several, and shows where they come from. Moves that name no part belong to the one that
    uses them.

    Args:
        compiled: text of the program.
        hbm_only: leave out what the compiler keeps on the chip.
    """
    return _sums(compiled, lambda instruction, program: _moved(instruction, program, hbm_only))


def cycles_by_part(compiled: str) -> Mapping[str, int]:
    """Cycles of a core that the compiler's own cost model gives the operations of each part.

    Args:
        compiled: text of the program.
    """
    return _sums(compiled, lambda instruction, _: instruction.cycles)


def _sums(compiled: str, cost: Callable[[Instruction, Mapping[str, Instruction]], float]) -> Mapping[str, int]:
    program = {i.name: i for i in instructions(compiled, entry_only=True)}
    users: dict[str, str] = {}
    for instruction in program.values():
        for operand in instruction.operands:
            users.setdefault(operand, instruction.name)
    totals = dict.fromkeys(PARTS, 0.0)
    for instruction in program.values():
        if instruction.op not in _FREE and not instruction.op.endswith("-done"):
            totals[_part(instruction, program, users)] += cost(instruction, program)
    return {part: round(total) for part, total in totals.items() if total}


def _moved(instruction: Instruction, program: Mapping[str, Instruction], hbm_only: bool) -> float:
    if instruction.op == "slice-start":  # (all of the source, the slice, flags): no more is read than written
        source, piece = instruction.arrays[:2]
        touched = [piece, source._replace(padded=piece.padded)]
    elif instruction.op == "copy-start":  # (the copy, the source, flags)
        touched = list(instruction.arrays[:2])
    else:
        # Other asynchronous starts list their operand, which is not written, among their results.
        written = instruction.arrays[:1] if instruction.op.endswith("-start") else instruction.arrays
        touched = [*written, *(a for name in instruction.operands if name in program for a in program[name].arrays)]
    return sum(array.kept_bytes for array in touched if array.in_hbm or not hbm_only)


def _part(instruction: Instruction, program: Mapping[str, Instruction], users: Mapping[str, str]) -> str:
    here: Instruction | None = instruction
    for _ in range(8):  # a start, its end, an element of it, a bitcast: chains are short
        if here is None:
            break
        if here.part:
            return here.part
        here = program.get(users.get(here.name, ""))
    return next((program[name].part for name in instruction.operands if name in program and program[name].part), OTHER)
