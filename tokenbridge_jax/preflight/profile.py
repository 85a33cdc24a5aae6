"""Where the time of a compiled TPU program goes, from the schedule that libtpu writes down.

An operation takes the longer of two times: the cycles of its bundles, and the bytes that it moves
over the bandwidth of the memory (HBM). Copies and collectives that run beside other operations
cost only what those leave to wait for. This does not see the latency of a copy that nothing hides,
chips that compete for a link, and a clock that changes.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from tokenbridge_jax.benchmark.programs import sources
from tokenbridge_jax.preflight.bundles import Schedule, read_schedule
from tokenbridge_jax.preflight.chips import Generation, Slice
from tokenbridge_jax.preflight.hlo import executed, find_collective, memory_traffic, read_bodies
from tokenbridge_jax.preflight.roofline import network_seconds

_BUNDLES = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_UTILIZATION = "-final_hlo-static-per-bundle-utilization.txt"


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of the program: all its runs, on one device.

    Attributes:
      name: of the instruction, such as `fusion.12`.
      source: where it comes from: JAX's path of functions and modules; empty if the compiler
        made it.
      runs: how often it runs in one run of the program.
      seconds: of all runs.
      bound: what takes the longest: `bundles`, `HBM` or `ICI` (the links between chips).
      cycles: of all runs; of one core, if the device has two.
      hbm_bytes: that all runs move.
      busy: unit -> share of its slots that the bundles use.
      guessed: whether its cycles depend on data, and were taken from one run of every loop.
    """

    name: str
    source: str
    runs: int
    seconds: float
    bound: str
    cycles: int = 0
    hbm_bytes: int = 0
    busy: dict[str, float] = dataclasses.field(default_factory=dict)
    guessed: bool = False


class _Channel:
    """Transfers that run beside operations, one after another; in seconds."""

    def __init__(self) -> None:
        self.left = dict[str, float]()

    def start(self, name: str, seconds: float) -> None:
        self.left[name] = seconds

    def advance(self, free: float) -> None:
        """Lets time pass in which nothing else uses the channel."""
        for name, left in self.left.items():
            self.left[name] = left - min(left, free)
            free -= left - self.left[name]

    def finish(self, name: str) -> float:
        """The seconds that remain until a transfer, and all before it, are done."""
        waited = 0.0
        if name in self.left:
            for other in list(self.left):
                waited += self.left.pop(other)
                if other == name:
                    break
        return waited


def read_profile(text: str, folder: Path, where: Slice, clock: float) -> list[Operation]:
    """The operations of a program that was compiled with `chips.slice_devices(where, folder)`.

    In the order of the program. A transfer that runs beside others is listed where it is waited
    for, with the time of the wait.

    Args:
      text: `compiled.as_text()`.
      folder: with the schedules.
      where: what it was compiled for.
      clock: cycles a second.
    """
    schedules, bodies = _Schedules(folder, where.figures), read_bodies(text)
    names = dict(sources(text))
    stream = list(executed(bodies))
    parts = [find_collective(line, runs, fusion, bodies) for line, _, runs, fusion in stream]
    last = {part[0]: number for number, part in enumerate(parts) if part}
    memory, links = _Channel(), _Channel()
    operations = list[Operation]()

    def add(name: str, runs: int, seconds: float, bound: str, **more: Any) -> None:
        if seconds:
            operations.append(Operation(name, names.get(name, ""), runs, seconds, bound, **more))

    def wait(name: str, runs: int, transfer: str) -> None:
        is_collective = transfer in links.left
        channel, other = (links, memory) if is_collective else (memory, links)
        waited = channel.finish(transfer)
        other.advance(waited)
        add(name, runs, waited, "ICI" if is_collective else "HBM")

    for number, (instruction, body, runs, fusion) in enumerate(stream):
        name, opcode = instruction.name, instruction.opcode
        if part := parts[number]:
            transfer, collective = part
            if transfer not in links.left:
                links.start(transfer, network_seconds(collective, where))
            if not opcode.endswith("-start") and last[transfer] == number:
                wait(name, runs, transfer)
        elif fusion:
            continue
        elif opcode.endswith("-start"):
            traffic = runs * memory_traffic(instruction, body, bodies)
            memory.start(name, traffic / where.figures.hbm)
        elif opcode.endswith("-done"):
            wait(name, runs, instruction.operands[0])
        elif schedule := schedules.find(name):
            cycles = runs * schedules.cycles(schedule)
            traffic = runs * schedules.cores * schedule.hbm_bytes
            moving, computing = traffic / where.figures.hbm, cycles / clock
            seconds = max(moving, computing)
            memory.advance(seconds - moving)
            links.advance(seconds)
            bound = "HBM" if moving > computing else "bundles"
            more = {"busy": schedule.busy, "guessed": schedule.guessed > 0}
            add(name, runs, seconds, bound, cycles=cycles, hbm_bytes=traffic, **more)
    return operations


class _Schedules:
    """The schedules in a folder. Operations that are alike share one."""

    def __init__(self, folder: Path, figures: Generation) -> None:
        self.figures = figures
        self.cores = figures.cores // figures.devices
        self.paths = {
            match[1]: path for path in folder.iterdir() if (match := _BUNDLES.fullmatch(path.name))
        }
        self.known = dict[str, Schedule]()
        for path in folder.glob("*deduplication-map.txt"):
            for group in path.read_text().split("key:")[1:]:
                key, _, _, *others = group.splitlines()
                for other in others:
                    if key in self.paths:
                        self.paths.setdefault(other.strip(), self.paths[key])

    def find(self, name: str) -> Schedule | None:
        """The schedule of an operation; None if it is a scalar's, which takes no time."""
        if not (path := self.paths.get(name)):
            return None
        if path.name not in self.known:
            utilization = re.sub(r"\d+-final_bundles.txt$", "*" + _UTILIZATION, path.name)
            (other,) = path.parent.glob(utilization)
            self.known[path.name] = read_schedule(
                path.read_text(), other.read_text(), self.figures.delay_slots
            )
        return self.known[path.name]

    def cycles(self, schedule: Schedule) -> int:
        """Cycles of a core; its matrix units take no less than their peak allows."""
        size = self.figures.matrix_unit
        at_peak = 2 * schedule.product_rows * size**2 * self.cores / self.figures.cycle_flops
        return max(schedule.cycles, round(at_peak))
