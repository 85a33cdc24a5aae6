"""Counts the cycles of a compiled TPU operation by running the scalar part of its schedule.

A TPU core executes one bundle of instructions a cycle, in the order that the compiler wrote down
(`--xla_jf_dump_to`). Loops and predicates are scalar instructions, and they depend on constants
alone: running only those gives how often each bundle runs, and which copies from and to HBM start.
"""

import collections
import dataclasses
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Bytes of the unit in which the schedule gives the sizes of copies.
GRANULE = 32

# Blocks of bundles that are run before a schedule is given up.
MOST_BLOCKS = 300_000

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]{2})? *:[ >]*{(.*)}((?: *@\d+)*)", re.MULTILINE)
_PRODUCT = re.compile(r" = vmatmul(?:\.[a-z]ubr)?\.([a-z]+\d+)")
# Rows of an instruction of a product, by its type.
_ROWS = collections.defaultdict(lambda: 32, f32=8, bf16=16)
_INSTRUCTION = re.compile(
    r" *(?:%?(?P<to>\S+) = )?(?P<op>[\w.\-]+)(?: \[thread:\S+\])?"
    r"(?: \((?P<not>!?)%(?P<if>\w+)(?:, (?P<else>[^)]+))?\),?)? ?(?P<args>.*)"
)

Value = int | None  # None: depends on data.


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What an operation does in one run on one core.

    Attributes:
      cycles: bundles that it executes.
      hbm_bytes: that its own copies move between HBM and the core's memories.
      busy: name of a unit -> share of the cycles' slots that it uses, from 0 to 1.
      product_rows: rows that go through a matrix unit, in its 128 or 256 columns.
      guessed: branches that depend on data: forward ones are not taken, loops run once.
    """

    cycles: int
    hbm_bytes: int
    busy: dict[str, float]
    product_rows: int
    guessed: int


class _Instruction(NamedTuple):
    to: str
    op: str
    args: tuple[str | int, ...]
    condition: str
    negated: bool
    otherwise: str | int | None


def read_schedule(bundles: str, utilization: str, delay_slots: int) -> Schedule:
    """Runs a schedule.

    Args:
      bundles: text of `*-final_bundles.txt`.
      utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
      delay_slots: bundles after a branch that are executed before it is taken.
    """
    program = _parse(bundles)
    counts, granules, guessed = _run(program, delay_slots)
    return Schedule(
        cycles=int(counts.sum()),
        hbm_bytes=granules * GRANULE,
        busy=_busy(utilization, counts),
        product_rows=int(counts @ program.product_rows),
        guessed=guessed,
    )


def _busy(utilization: str, counts: np.ndarray) -> dict[str, float]:
    head, _, text = utilization.partition("== UTILIZATION:\n")
    names, capacity = head.splitlines()[1:3]
    used = np.array([row.split() for row in text.splitlines() if row.strip()], float)
    slots = np.array(capacity.split(), float)
    rows = min(len(used), len(counts))
    shares = counts[:rows] @ used[:rows] / np.maximum(slots * counts.sum(), 1)
    return dict(zip(map(str.strip, names.split(",")), shares.tolist(), strict=True))


class _Program(NamedTuple):
    bundles: list[list[_Instruction]]
    labels: dict[str, int]
    unnamed: list[int]
    product_rows: np.ndarray

    def target(self, label: str, branch: int) -> int:
        """The bundle that a branch leads to; the end of a loop may have lost its label."""
        if label in self.labels:
            return self.labels[label]
        return next((n for n in self.unnamed if n > branch), len(self.bundles))


def _parse(text: str) -> _Program:
    """The scalar instructions that decide about branches and copies, by bundle."""

    def keep_labels(comment: re.Match[str]) -> str:
        return "".join(f" @{number}" for number in _LABEL.findall(comment[0]))

    bundles, labels, unnamed, product_rows = [], dict[str, int](), list[int](), list[int]()
    for number, match in enumerate(_BUNDLE.finditer(_COMMENT.sub(keep_labels, text))):
        # A phi's registers are one and the same.
        parts = [part for part in match[2].split(";;") if part.strip() and " = sphi " not in part]
        bundles.append(list(map(_instruction, parts)))
        product_rows.append(sum(_ROWS[kind] for kind in _PRODUCT.findall(match[2])))
        for label in match[3].split():
            labels.setdefault(label[1:], number)
        if match[1] == "PF" and not match[3].strip():
            unnamed.append(number)
    needed = {"sbr.rel", "dma"}
    registers = set[str]()
    writers = collections.defaultdict[str, list[_Instruction]](list)
    for bundle in bundles:
        for instruction in bundle:
            writers[instruction.to].append(instruction)
    pending = [one for bundle in bundles for one in bundle if one.op in needed]
    while pending:
        one = pending.pop()
        sources = {one.condition, one.otherwise, *one.args} - registers
        for source in sources:
            if isinstance(source, str) and source:
                registers.add(source)
                pending += writers[source]
    kept = [
        [one for one in bundle if one.op in needed or one.to in registers] for bundle in bundles
    ]
    return _Program(kept, labels, unnamed, np.array(product_rows, np.int64))


def _instruction(text: str) -> _Instruction:
    match = _INSTRUCTION.fullmatch(text.strip())
    assert match, text
    op, args = match["op"], match["args"]
    target = _register(match["to"] or "")
    if op == "sst":  # sst [smem:PLACE] VALUE writes a place.
        place, _, args = args.rpartition(" ")
        target = place
        op = "smov"
    elif op == "sbr.rel":
        args = args.partition("$region")[2]
        return _Instruction("", op, (args.strip(),), _register(match["if"] or ""),
                            match["not"] == "!", None)  # fmt: skip
    elif op == "dma.done.wait":  # SEMAPHORE, GRANULES
        op, args = "dma", args.rpartition(",")[2]
    return _Instruction(
        target,
        op,
        tuple(_operand(part) for part in args.split(",")),
        _register(match["if"] or ""),
        match["not"] == "!",
        None if match["else"] is None else _operand(match["else"]),
    )


def _register(name: str) -> str:
    """The physical register of `s123_s4` is s4."""
    return name.lstrip("%").rpartition("_")[2]


def _operand(text: str) -> str | int:
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return _signed(int(text))
    if text.startswith("%"):
        return _register(text)
    return text  # A place in memory.


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _compare(relation: str) -> Callable[[int, int], int]:
    def compare(a: int, b: int) -> int:
        if ".u32" in relation:
            a, b = a % 2**32, b % 2**32
        return int(getattr(operator, relation.split(".")[1])(a, b))

    return compare


_OPERATIONS: dict[str, Callable[..., int]] = {
    "smov": lambda a: a,
    "sld": lambda a: a,
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, n: a << n,
    "sshra.s32": lambda a, n: a >> n,
    "sshrl.u32": lambda a, n: (a % 2**32) >> n,
    "smin.u32": lambda a, b: min(a % 2**32, b % 2**32),
    "smax.u32": lambda a, b: max(a % 2**32, b % 2**32),
    "smin.s32": min,
    "smax.s32": max,
    "pnand": lambda a, b: int(not (a and b)),
    "pand": lambda a, b: int(a and b),
    "por": lambda a, b: int(a or b),
    "pxor": operator.xor,
    "pneg": lambda a: int(not a),
    "scalar_select": lambda p, a, b: a if p else b,
}


def _run(program: _Program, delay_slots: int) -> tuple[np.ndarray, int, int]:
    """How often each bundle runs, granules copied, and branches that depend on data."""
    bundles = program.bundles
    values: dict[str, Value] = {}
    counts = np.zeros(len(bundles), np.int64)
    interesting = [number for number, bundle in enumerate(bundles) if bundle] + [len(bundles)]
    following = np.searchsorted(interesting, np.arange(len(bundles) + 1))
    marks = np.zeros(len(bundles) + 1, np.int64)  # +1 where a run of bundles starts, -1 at its end.
    granules = 0
    guesses = set[int]()

    def read(operand: str | int) -> Value:
        return operand if isinstance(operand, int) else values.get(operand)

    def evaluate(one: _Instruction) -> Value:
        condition: Value = 1
        if one.condition:
            condition = values.get(one.condition)
            if condition is not None and one.negated:
                condition = 1 - condition
        if condition == 0:
            return read(one.to) if one.otherwise is None else read(one.otherwise)
        if condition is None:
            return None
        arguments = [read(operand) for operand in one.args]
        operation = _OPERATIONS.get(one.op)
        if one.op.startswith("scmp."):
            operation = _compare(one.op)
        if operation is None or None in arguments:
            return _absorbed(one.op, arguments)
        return _signed(operation(*arguments))

    start, blocks = 0, 0
    position = 0
    while position < len(bundles):
        blocks += 1
        branch = None
        index = following[position]
        while (number := interesting[index]) < len(bundles):
            writes = []
            for one in bundles[number]:
                if one.op == "sbr.rel":
                    taken = _condition(one, values)
                    if taken is None:
                        guesses.add(number)
                    elif taken:
                        branch = program.target(str(one.args[0]), number)
                elif one.op == "dma":
                    if _condition(one, values) != 0:
                        granules += read(one.args[0]) or 0
                else:
                    writes.append((one.to, evaluate(one)))
            values.update(writes)
            index += 1
            if branch is not None:
                break
        if branch is None:
            marks[start] += 1
            marks[len(bundles)] -= 1
            break
        end = number + 1
        for slot in range(number + 1, min(number + 1 + delay_slots, len(bundles))):
            values.update((one.to, evaluate(one)) for one in bundles[slot] if one.op not in
                          ("sbr.rel", "dma"))  # fmt: skip
            end = slot + 1
        marks[start] += 1
        marks[end] -= 1
        start = position = branch
        if blocks > MOST_BLOCKS:
            guesses.add(number)
            break
    counts = np.cumsum(marks)[:-1]
    return counts, granules, len(guesses)


def _condition(one: _Instruction, values: dict[str, Value]) -> Value:
    if not one.condition:
        return 1
    value = values.get(one.condition)
    return value if value is None or not one.negated else 1 - value


def _absorbed(op: str, arguments: list[Value]) -> Value:
    """What is known although an operand is not: `0 nand x` is 1, `1 or x` is 1."""
    if op == "pnand" and 0 in arguments:
        return 1
    if op == "por" and 1 in arguments:
        return 1
    if op in ("pand", "sand.u32") and 0 in arguments:
        return 0
    return None
