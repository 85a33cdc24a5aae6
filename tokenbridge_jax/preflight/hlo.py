"""Reads cycles, memory traffic and collectives from the text of a program compiled by libtpu.

The body of a loop counts as often as it runs. (`compiled.cost_analysis()` counts it once.)
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*{\n((?:  .*\n)*)", re.MULTILINE)
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)(?:e\w+)?)\[([\d,]*)\]({[^}]*})?")

# Instructions that move nothing, or that are the uncounted half of a pair.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "custom-call",
    "copy-done", "slice-done", "call-done", "partition-id", "replica-id", "iota",
}  # fmt: skip


class Instruction(NamedTuple):
    """One line: `%name = result opcode(operands), rest`."""

    name: str
    result: str
    opcode: str
    operands: list[str]
    text: str


# The instructions of a computation by name; the last one is its result.
Body = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: number of devices that take part in each.
      count: number of instructions.
      runs: number of times that they run, together.
      bytes: size of the whole arrays (a gather's result, a scatter's operand), over all runs.
    """

    kind: str
    group: int
    count: int
    runs: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends if the array is split into `group` parts in a ring."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Program:
    """The work of one device in one run of a program.

    Attributes:
      cycles: libtpu's estimate for all instructions but collectives, one after another.
      traffic: bytes read from and written to memory.
      collectives: largest first.
    """

    cycles: int
    traffic: int
    collectives: list[Collective]


def read_program(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    bodies = read_bodies(text)
    cycles = traffic = 0
    collectives = dict[str, Collective]()
    for instruction, body, runs, fusion in executed(bodies):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
        if not fusion:
            cycles += runs * int(estimate[1]) if estimate else 0
            traffic += runs * memory_traffic(instruction, body, bodies)
        if found := find_collective(instruction, runs, fusion, bodies):
            collectives.setdefault(*found)
    return Program(cycles, traffic, _together(collectives.values()))


def read_bodies(text: str) -> dict[str, Body]:
    """The computations of `compiled.as_text()`, in its order, the entry last."""
    return {
        name: {line.name: line for line in map(_parse, body.splitlines()) if line}
        for name, body in _COMPUTATION.findall(text)
    }


def _parse(line: str) -> Instruction | None:
    if not (match := _INSTRUCTION.match(line)):
        return None
    _, name, result, opcode, rest = match.groups()
    return Instruction(name, result, opcode, re.findall(r"%([^\s,)]+)", rest.split(")")[0]), line)


def executed(bodies: dict[str, Body]) -> Iterator[tuple[Instruction, Body, int, str]]:
    """Every instruction, with its computation, how often it runs, and the fusion it is in."""

    def visit(name: str, runs: int, fusion: str) -> Iterator[tuple[Instruction, Body, int, str]]:
        for instruction in bodies[name].values():
            yield instruction, bodies[name], runs, fusion
            if instruction.opcode == "while":
                condition, body = re.findall(r"(?:condition|body)=%([^\s,]+)", instruction.text)
                # A scan's condition compares its counter with a constant.
                tests = "\n".join(line.text for line in bodies[condition].values())
                bounds = re.findall(r" constant\((\d+)\)", tests)
                yield from visit(body, runs * max(map(int, bounds), default=1), fusion)
            elif called := _called(instruction):
                yield from visit(called, runs, fusion or called)

    return visit(list(bodies)[-1], 1, "")  # The entry comes last.


def _called(instruction: Instruction) -> str:
    found = re.search(r"calls=%([^\s,]+)", instruction.text)
    return found[1] if instruction.opcode == "fusion" and found else ""


def _sizes(result: str, *, in_memory: bool = False) -> list[int]:
    """Bytes of each array of a result; with `in_memory`, 0 for those in memories of the core."""
    return [
        0
        if in_memory and "S(" in layout
        else math.prod(map(int, re.findall(r"\d+", shape))) * int(width or 8) // 8
        for width, shape, layout in _ARRAY.findall(result)
    ]


def memory_traffic(instruction: Instruction, body: Body, bodies: dict[str, Body]) -> int:
    """Bytes that one run of an instruction reads from memory and writes to it."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return 0
    if _offloaded(instruction, bodies):
        return 0
    if opcode == "slice-start":  # ((operand), result, context)
        return 2 * _sizes(instruction.result)[1]
    written = _sizes(instruction.result, in_memory=True)
    if opcode.endswith("-start"):  # The result contains operand and result.
        return sum(written)
    read = [sum(_sizes(body[name].result, in_memory=True)) for name in instruction.operands]
    if opcode == "dynamic-slice":
        read = [min(read[0], sum(written))]
    elif opcode == "dynamic-update-slice":
        written, read = [], [2 * read[1]]
    elif called := _called(instruction):
        return _fusion_traffic(bodies[called], read, written)
    return sum(read) + sum(written)


def _fusion_traffic(body: Body, read: list[int], written: list[int]) -> int:
    """Traffic of a fusion: a sliced operand counts as its slice, an updated one as its update."""
    total = 0
    users = collections.defaultdict[str, list[Instruction]](list)
    for instruction in body.values():
        for operand in instruction.operands:
            users[operand].append(instruction)

    def cut(operand: str) -> int | float:
        """Bytes read of an operand that is only sliced or updated in place; otherwise infinity."""
        total: int | float = 0
        for user in users[operand]:
            if user.opcode == "dynamic-slice":
                total += sum(_sizes(user.result))
            elif user.opcode in ("bitcast", "reshape", "copy"):
                total += cut(user.name)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != operand:
                return math.inf
        return total

    for instruction in body.values():
        if instruction.opcode == "parameter":
            number = int(re.findall(r" parameter\((\d+)\)", instruction.text)[0])
            total += int(min(read[number], cut(instruction.name)))
    root = list(body.values())[-1]
    roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, size in zip(roots, written, strict=False):
        while result.opcode in ("bitcast", "reshape", "copy"):
            result = body[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            size = min(size, sum(_sizes(body[result.operands[1]].result)))
        total += size
    return total


def find_collective(
    instruction: Instruction, runs: int, fusion: str, bodies: dict[str, Body]
) -> tuple[str, Collective] | None:
    """The collective that an instruction starts, and its name; None if it starts none.

    A collective that is spread over several fusions has one name in all of them. One that the
    SparseCores run has the name of the call that starts it.
    """
    if offloaded := _offloaded(instruction, bodies):
        found = find_collective(offloaded, runs, fusion, bodies)
        return found and (instruction.name, found[1])
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    sizes, group = _sizes(instruction.result), _group_size(instruction.text)
    # The result of a start contains the operand too.
    size = max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
        size *= group
    channel = re.search(r"channel_id=(\d+)", instruction.text)
    name = instruction.name
    if fusion.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    elif fusion and channel:
        name = channel[1]
    return name, Collective(kind, group, 1, runs, runs * size)


def _offloaded(instruction: Instruction, bodies: dict[str, Body]) -> Instruction | None:
    """The collective in the computation that an instruction lets the SparseCores run."""
    if instruction.opcode != "call-start":
        return None
    called = re.search(r"to_apply=%([^\s,]+)", instruction.text)
    inside = bodies[called[1]].values() if called else ()
    return next((line for line in inside if line.opcode in COLLECTIVES), None)


def _group_size(text: str) -> int:
    """Size of a group, from `{{0,1},{2,3}}`, `[2,2]<=[4]`, or axes: `mesh['a'=2,...] {'a'}`."""
    if listed := re.search(r"replica_groups={{([\d,]+)}", text):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(tiled[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*? {([^}]*)}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2  # A permutation has pairs.


def _together(found: Iterable[Collective]) -> list[Collective]:
    totals = dict[tuple[str, int], Collective]()
    for one in found:
        kind, group = one.kind, one.group
        sum_so_far = totals.get((kind, group), Collective(kind, group, 0, 0, 0))
        totals[kind, group] = Collective(
            kind,
            group,
            sum_so_far.count + one.count,
            sum_so_far.runs + one.runs,
            sum_so_far.bytes + one.bytes,
        )
    return sorted(totals.values(), key=lambda collective: -collective.bytes)
