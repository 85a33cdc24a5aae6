"""Shows where the time of a call goes: the profiler's device events as tables, longest first."""

import collections
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# Longer names (a kernel's C++ signature) are shortened in the middle.
_NAME_WIDTH = 60
# Parts of an instruction's name that do not name a module: control flow, transformations such as
# `jit(step)`, methods such as `TokenBridge.loss`, equations of `einsum`.
_HOW = re.compile(
    r"while|body|cond|branch_\d+_fun|closed_call|shard_map|checkpoint|rematted_computation|"
    r"eval_jaxpr|.*\(.*|.*->.*|[A-Z].*"
)


# Name -> nanoseconds of each event.
Rows = dict[str, list[float]]


def record(call: Callable[[], Any], calls: int, names: Mapping[str, str]) -> str:
    """Profiles `calls` calls in a row, which are already compiled; returns `tabulate`'s text."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Calls of Python functions are many, and not needed.
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    return tabulate(data, calls, names)


def tabulate(data: jax.profiler.ProfileData, calls: int, names: Mapping[str, str]) -> str:
    """Makes two tables: the time of every place in the code, and of every operation.

    Args:
      data: the profiler's events.
      calls: the number of calls; the tables are averages over them.
      names: instruction -> the place in the code that it comes from (`programs.source_names`).

    Returns:
      Text. The time of a loop does not include the operations in it. If streams (on a CPU: threads)
      run at once, the sum over operations is more than the time in which any of them ran.
    """
    places: Rows = collections.defaultdict(list)
    operations: Rows = collections.defaultdict(list)
    busy = 0.0
    for lines in _devices(data):
        busy += _covered([event for line in lines for event, _ in line])
        for event, nanoseconds in itertools.chain.from_iterable(lines):
            name = event.name.split(" = ")[0].lstrip("%")  # On a TPU it is a whole line of HLO.
            instruction = _instruction(event)
            # Operations inside a CUDA graph have the name of the kernel only.
            source = names.get(instruction) or names.get(name) or ""
            places[place(source) or name].append(nanoseconds)
            if len(name) > _NAME_WIDTH:
                half = (_NAME_WIDTH - 3) // 2
                name = f"{name[:half]}...{name[-half:]}"
            operations[f"{name:{_NAME_WIDTH}}  {source}"].append(nanoseconds)
    if not operations:
        return "the profiler saw no operation of a device\n"
    total = sum(map(sum, places.values()))
    head = (
        f"{total / calls / 1e6:.3f} ms a call in operations, {busy / calls / 1e6:.3f} ms in which "
        f"any of them ran; over all devices; {calls} calls\n"
    )
    tables = _table("place", places, calls), _table("operation", operations, calls)
    return "\n".join([head, *tables])


def _table(title: str, rows: Rows, calls: int) -> str:
    """A line for each name: milliseconds, share and events of a call, microseconds of an event."""
    total = sum(map(sum, rows.values()))
    lines = [f"{'ms':>10} {'share':>7} {'events':>8} {'us each':>9}  {title}"]
    for name, times in sorted(rows.items(), key=lambda item: -sum(item[1])):
        lines.append(
            f"{sum(times) / calls / 1e6:10.3f} {sum(times) / total:7.2%} "
            f"{len(times) / calls:8.4g} {sum(times) / len(times) / 1e3:9.1f}  {name}"
        )
    return "\n".join(lines) + "\n"


def place(source: str) -> str:
    """The module of an instruction; marks the backward pass and recomputation."""
    again = "again: " if "rematted_computation" in source else ""
    which = again or ("backward: " if "transpose(" in source else "")
    # `mlp/mlp.terms` is a method of the module `mlp`; `blocks/blocks_3` is one of several blocks.
    path = [part for part in source.split("/")[:-1] if not _HOW.fullmatch(part)]
    parts = [re.sub(r"\..*|(?<=blocks)_\d+$", "", part) for part in path]
    modules = [part for part, _ in itertools.groupby(parts)]
    return which + "/".join(modules) if modules else source


def _devices(data: Any) -> Iterator[list[list[tuple[Any, float]]]]:
    """Events with nanoseconds, for each stream of each device, or for each thread of a CPU."""
    # A libtpu that only compiles gives a plane without lines.
    planes = [one for one in data.planes if one.name.startswith("/device:") and list(one.lines)]
    for plane in planes:
        # Kernels of a GPU do not contain each other, even if their times overlap.
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
    """The instruction that an event belongs to, or an empty text."""
    return str(dict(event.stats).get("hlo_op", ""))


def _own_time(events: list[Any]) -> list[tuple[Any, float]]:
    """Events with their nanoseconds, without the nanoseconds of events inside them."""
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
