"""Where the time of a call is spent: the profiler's device events as a table, longest first."""

import collections
import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# Longer names (a kernel's C++ signature) are shortened in the middle.
_NAME_WIDTH = 60
# Parts of an instruction's name that say how it runs: control flow, transformations such as
# `jit(step)`, methods of modules such as `TokenBridge.loss`, equations of `einsum`.
_HOW = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|eval_jaxpr|"
    r".*\(.*|.*->.*|[A-Z].*"
)


@dataclasses.dataclass
class Row:
    """Events of one kind: how many, and their nanoseconds."""

    count: int = 0
    nanoseconds: float = 0.0

    def add(self, nanoseconds: float) -> None:
        """Counts one more."""
        self.count += 1
        self.nanoseconds += nanoseconds


def record(call: Callable[[], Any], calls: int, names: Mapping[str, str]) -> str:
    """Profiles `calls` calls back to back, already compiled; returns `tabulate`'s text."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls are many, and not needed.
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    return tabulate(data, calls, names)


def tabulate(data: jax.profiler.ProfileData, calls: int, names: Mapping[str, str]) -> str:
    """Two tables: the time of every place in the code, and of every operation.

    Args:
      data: what the profiler saw.
      calls: the number of calls; the tables are about one.
      names: instruction -> where in the code it comes from (`programs.source_names`).

    Returns:
      Text. The time of an operation that contains others (a loop) is its own only. If streams (on a
      CPU: threads) run at once, operations add up to more than the time in which any ran.
    """
    places: dict[str, Row] = collections.defaultdict(Row)
    operations: dict[str, Row] = collections.defaultdict(Row)
    busy = 0.0
    for lines in _devices(data):
        busy += _covered([event for line in lines for event, _ in line])
        for event, nanoseconds in itertools.chain.from_iterable(lines):
            name = event.name.split(" = ")[0].lstrip("%")  # A TPU's are whole lines of HLO.
            instruction = _instruction(event)
            # What runs inside a CUDA graph is known by its kernel's name only.
            source = names.get(instruction) or names.get(name) or ""
            places[place(source) or name].add(nanoseconds)
            operations[f"{_shortened(name):{_NAME_WIDTH}}  {source}"].add(nanoseconds)
    if not operations:
        return "the profiler saw no operation of a device\n"
    total = sum(row.nanoseconds for row in places.values())
    head = (
        f"{total / calls / 1e6:.3f} ms a call in operations, {busy / calls / 1e6:.3f} ms in which "
        f"any of them ran; over all devices; {calls} calls\n"
    )
    tables = _table("place", places, calls), _table("operation", operations, calls)
    return "\n".join([head, *tables])


def _table(title: str, rows: Mapping[str, Row], calls: int) -> str:
    """Longest first: milliseconds, share and events of a call, microseconds of an event."""
    total = sum(row.nanoseconds for row in rows.values())
    lines = [f"{'ms':>10} {'share':>7} {'events':>8} {'us each':>9}  {title}"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1].nanoseconds):
        lines.append(
            f"{row.nanoseconds / calls / 1e6:10.3f} {row.nanoseconds / total:7.2%} "
            f"{row.count / calls:8.4g} {row.nanoseconds / row.count / 1e3:9.1f}  {name}"
        )
    return "\n".join(lines) + "\n"


def place(source: str) -> str:
    """The module of an instruction, and whether it runs backward or again."""
    again = "again: " if "rematted_computation" in source else ""
    which = again or ("backward: " if "transpose(" in source else "")
    # `mlp.terms` is a method of `mlp`; `mlp/mlp.terms` and `mlp/mlp` are the module `mlp`.
    parts = [part.split(".")[0] for part in source.split("/")[:-1] if not _HOW.fullmatch(part)]
    modules = [part for part, _ in itertools.groupby(parts)]
    return which + "/".join(modules) if modules else source


def _devices(data: Any) -> Iterator[list[list[tuple[Any, float]]]]:
    """The events of each stream of each device, or of each thread of a CPU, with nanoseconds."""
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    for plane in planes:
        # Kernels of a GPU do not contain each other, even where their times overlap.
        streams = [line for line in plane.lines if line.name.startswith("Stream")]
        kernels = [[(event, event.duration_ns) for event in line.events] for line in streams]
        operations = [line for line in plane.lines if line.name == "XLA Ops"]  # of a TPU
        yield kernels + [_own_time(list(line.events)) for line in operations]
    if not planes:
        lines = [line for plane in data.planes for line in plane.lines]
        yield [_own_time([event for event in line.events if _instruction(event)]) for line in lines]


def _covered(events: list[Any]) -> float:
    """Nanoseconds in which at least one of the events runs."""
    total = reached = 0.0
    for event in sorted(events, key=lambda event: event.start_ns):
        total += max(0.0, _end(event) - max(reached, event.start_ns))
        reached = max(reached, _end(event))
    return total


def _instruction(event: Any) -> str:
    """The instruction that an event belongs to, or nothing."""
    return str(dict(event.stats).get("hlo_op", ""))


def _own_time(events: list[Any]) -> list[tuple[Any, float]]:
    """Events of one line with their nanoseconds, without those of the events inside them."""
    events = sorted(events, key=lambda event: (event.start_ns, -event.duration_ns))
    own = [event.duration_ns for event in events]
    around: list[int] = []
    for i, event in enumerate(events):
        while around and _end(events[around[-1]]) <= event.start_ns:
            around.pop()
        if around:
            own[around[-1]] -= event.duration_ns
        around.append(i)
    return list(zip(events, own, strict=True))


def _end(event: Any) -> float:
    return event.start_ns + event.duration_ns


def _shortened(name: str) -> str:
    if len(name) <= _NAME_WIDTH:
        return name
    half = (_NAME_WIDTH - 3) // 2
    return f"{name[:half]}...{name[-half:]}"
