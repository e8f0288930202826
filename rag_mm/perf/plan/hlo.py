"""Parses the collectives of a compiled program from its HLO text: count, executions and bytes."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
# As lists, as [groups,size], or as axes of a device mesh: mesh['a'=16,'b'=4] {'b'}.
_LISTS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\S* \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: bytes that a chip sends per execution (ring over its group), and executions."""

    kind: str
    group_size: int
    sent_bytes: float
    times: int


def read_collectives(text: str) -> list[Collective]:
    """All collectives of a program's text; loop bodies count with their trip count where it is known."""
    bodies = _computations(text)
    times = _times(bodies, _entry(text))
    collectives = []
    for name, lines in bodies.items():
        for shape, opcode, rest in _instructions(lines):
            kind = opcode.removesuffix("-start")
            if kind in KINDS and name in times:
                size = _group_size(rest)
                sent = _sent_bytes(kind, _nbytes(shape, opcode), size)
                collectives.append(Collective(kind, size, sent, times[name]))
    return collectives


def count(collectives: list[Collective]) -> dict[str, int]:
    """Number of instructions of each kind."""
    return {kind: sum(c.kind == kind for c in collectives) for kind in KINDS}


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = bodies[head.group(1)] = []
        elif line.startswith("  "):
            lines.append(line)
    return bodies


def _entry(text: str) -> str:
    head = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    if head is None:
        raise ValueError("not HLO text: there is no ENTRY computation")
    return head.group(1)


def _instructions(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match:
            yield match.group(1), match.group(2), match.group(3)


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """Number of executions of each computation reachable from the entry."""
    times: dict[str, int] = {}

    def visit(name: str, factor: int) -> None:
        times[name] = times.get(name, 0) + factor
        for _, opcode, rest in _instructions(bodies.get(name, [])):
            repeats = _num_trips(bodies, rest) if opcode == "while" else 1
            branches = _BRANCHES.search(rest)
            called = _CALLED.findall(rest)
            called += (
                [b.strip().lstrip("%") for b in branches.group(1).split(",")] if branches else []
            )
            for callee in called:
                if callee in bodies:
                    visit(callee, factor * repeats)

    visit(entry, 1)
    return times


def _num_trips(bodies: dict[str, list[str]], rest: str) -> int:
    """Trip count of a loop from 0 to a constant, as in `lax.scan`; 1 if no constant is found."""
    condition = _CONDITION.search(rest)
    lines = bodies.get(condition.group(1), []) if condition else []
    bounds = [int(match.group(1)) for line in lines if (match := _BOUND.search(line))]
    return max(bounds, default=1)


def _group_size(rest: str) -> int:
    if match := _MESH.search(rest):
        sizes = dict(part.split("=") for part in match.group(1).split(","))
        return math.prod(int(sizes[axis]) for axis in match.group(2).split(","))
    if match := _IOTA.search(rest):
        return int(match.group(2))
    if match := _LISTS.search(rest):
        return len(match.group(1).split(","))
    return 2  # The pairs of a permutation.


def _nbytes(shape: str, opcode: str) -> int:
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shape)
    ]
    if opcode.endswith("-start") and len(sizes) > 1:
        # A tuple of operands, results and small flags. The result is the largest in an all-gather, and no
        # started collective here has a result smaller than its operand.
        return max(sizes)
    return sum(sizes)


def _sent_bytes(kind: str, result_bytes: int, size: int) -> float:
    """Bytes that one chip sends in a ring of `size` chips for a result of `result_bytes` per chip."""
    share = (size - 1) / max(size, 1)
    return (
        result_bytes
        * {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": size - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }[kind]
    )
