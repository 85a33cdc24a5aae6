"""Counts the cycles of a compiled TPU operation by running the scalar part of its schedule.

A TPU core executes one bundle of instructions a cycle, in the order that the compiler wrote down
(`--xla_jf_dump_to`). Loops and predicates are scalar instructions, and they depend on constants
alone: running only those gives how often each bundle runs, and which copies from and to HBM start.
"""

import collections
import dataclasses
import itertools
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Bytes of the unit in which the schedule gives the sizes of copies.
GRANULE = 32

# Blocks of bundles that are run before a schedule is given up.
MOST_BLOCKS = 300_000

_BRANCH, _WAIT = "sbr.rel", "dma.done.wait"
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
    """`to = op (condition, otherwise), args`; `otherwise` is the result if it is not executed."""

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
    """Bundles with the scalar instructions that decide; labels of bundles; rows of products.

    `unnamed` are the bundles after a region that have no label.
    """

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
    kept = _deciding(bundles)
    return _Program(kept, labels, unnamed, np.array(product_rows, np.int64))


def _deciding(bundles: list[list[_Instruction]]) -> list[list[_Instruction]]:
    """Branches, waits for copies, and the instructions that these depend on."""
    writers = collections.defaultdict[str, list[_Instruction]](list)
    for one in itertools.chain.from_iterable(bundles):
        writers[one.to].append(one)
    always = (_BRANCH, _WAIT)
    pending = [one for one in itertools.chain.from_iterable(bundles) if one.op in always]
    registers = set[str]()
    while pending:
        one = pending.pop()
        for source in {one.condition, one.otherwise, *one.args} - registers:
            if isinstance(source, str) and source:
                registers.add(source)
                pending += writers[source]
    return [
        [one for one in bundle if one.op in always or one.to in registers] for bundle in bundles
    ]


def _instruction(text: str) -> _Instruction:
    match = _INSTRUCTION.fullmatch(text.strip())
    assert match, text
    op, args, to = match["op"], match["args"], _register(match["to"] or "")
    if op == "sst":  # sst [smem:PLACE] VALUE
        to, _, args = args.rpartition(" ")
        op = "smov"
    elif op == _BRANCH:  # target = $regionNUMBER
        to, args = "", args.partition("$region")[2]
    elif op == _WAIT:  # SEMAPHORE, GRANULES
        args = args.rpartition(",")[2]
    condition, otherwise = _register(match["if"] or ""), match["else"]
    return _Instruction(
        to,
        op,
        tuple(map(_operand, args.split(","))),
        condition,
        match["not"] == "!",
        None if otherwise is None else _operand(otherwise),
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


def _unsigned(operation: Callable[[int, int], int]) -> Callable[[int, int], int]:
    return lambda a, b: operation(a % 2**32, b % 2**32)


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
    "smin.u32": _unsigned(min),
    "smax.u32": _unsigned(max),
    "smin.s32": min,
    "smax.s32": max,
    "pnand": lambda a, b: int(not (a and b)),
    "pand": lambda a, b: int(a and b),
    "por": lambda a, b: int(a or b),
    "pxor": operator.xor,
    "pneg": lambda a: int(not a),
    "scalar_select": lambda p, a, b: a if p else b,
}
for _relation in ("lt", "le", "gt", "ge", "eq", "ne"):
    _compare = getattr(operator, _relation)
    _OPERATIONS[f"scmp.{_relation}.s32.totalorder"] = _compare
    _OPERATIONS[f"scmp.{_relation}.u32.totalorder"] = _unsigned(_compare)

# Operation -> an operand that decides its result, whatever the other is, and that result.
_DECISIVE = {"pnand": (0, 1), "por": (1, 1), "pand": (0, 0), "sand.u32": (0, 0)}


class _ScalarUnit:
    """Executes the scalar instructions of a program, and counts."""

    def __init__(self, program: _Program) -> None:
        self.program = program
        self.values: dict[str, Value] = {}  # Of registers and places in memory.
        self.granules = 0
        self.guesses = set[int]()
        full = [number for number, bundle in enumerate(program.bundles) if bundle]
        self._full = [*full, len(program.bundles)]
        self._next_full = np.searchsorted(self._full, np.arange(len(program.bundles) + 1)).tolist()

    def execute_block(self, start: int, delay_slots: int) -> tuple[int, int | None]:
        """Executes bundles up to the next branch that is taken.

        Returns:
          The bundle after the last one, and the one that the branch leads to; None at the end.
        """
        index = self._next_full[start]
        while (number := self._full[index]) < len(self.program.bundles):
            target = self._execute(number)
            if target is not None:
                end = min(number + 1 + delay_slots, len(self.program.bundles))
                for slot in range(number + 1, end):
                    self._execute(slot)
                return end, target
            index += 1
        return len(self.program.bundles), None

    def _execute(self, number: int) -> int | None:
        """Executes a bundle; returns the one that it branches to, if it does."""
        target, writes = None, []
        for one in self.program.bundles[number]:
            if one.op == _BRANCH:
                taken = self._condition(one)
                if taken is None:
                    self.guesses.add(number)
                elif taken:
                    target = self.program.target(str(one.args[0]), number)
            elif one.op == _WAIT:
                if self._condition(one) != 0:
                    self.granules += self._read(one.args[0]) or 0
            else:
                writes.append((one.to, self._evaluate(one)))
        self.values.update(writes)  # After all instructions of the bundle have read.
        return target

    def _read(self, operand: str | int | None) -> Value:
        return self.values.get(operand) if isinstance(operand, str) else operand

    def _condition(self, one: _Instruction) -> Value:
        """1 if an instruction is executed, 0 if it is not."""
        if not one.condition:
            return 1
        value = self.values.get(one.condition)
        return value if value is None or not one.negated else 1 - value

    def _evaluate(self, one: _Instruction) -> Value:
        condition = self._condition(one)
        if condition is None:
            return None
        if condition == 0:
            return self._read(one.to if one.otherwise is None else one.otherwise)
        arguments: list[Any] = [self._read(operand) for operand in one.args]
        if None not in arguments:
            operation = _OPERATIONS.get(one.op)
            return _signed(operation(*arguments)) if operation else None
        if one.op in _DECISIVE:
            operand, result = _DECISIVE[one.op]
            return result if operand in arguments else None
        return None


def _run(program: _Program, delay_slots: int) -> tuple[np.ndarray, int, int]:
    """How often each bundle runs, granules copied, and branches that depend on data."""
    unit = _ScalarUnit(program)
    # 1 more from the start of a block on, 1 less from its end on.
    changes = np.zeros(len(program.bundles) + 1, np.int64)
    start = 0
    for _ in range(MOST_BLOCKS):
        end, target = unit.execute_block(start, delay_slots)
        changes[start] += 1
        changes[end] -= 1
        if target is None:
            break
        start = target
    else:
        unit.guesses.add(-1)
    return np.cumsum(changes)[:-1], unit.granules, len(unit.guesses)
