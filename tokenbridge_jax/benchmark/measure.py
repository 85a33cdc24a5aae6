"""Measures cases, and reports each as a line of JSON.

what, settings         the case; if `calls_per_timing` is above 1, that many short calls were timed
                       together
seconds                of one call: median, min and max of the repeats; in training, the time
                       between the ends of two steps, while the next step has already started
compile_seconds        the first call's time minus the median; short if an earlier command compiled
                       the program (see `runtime/compilation_cache.py`)
cpu_seconds            CPU time of one call, over all threads of this process
*_per_second           images, positions, values or bytes, from the median
flops_by_hand          matmul FLOPs that the mathematics needs for one call, without padding and
                       recomputation
flops_by_compiler      XLA's count for the programs of a call, over all devices; the body of a loop
                       counts once, however often it runs
share_of_peak          flops_by_hand a second, relative to the large matrix product of this run
share_of_copy          bytes a second, relative to the large copy of this run
peak_memory_bytes      the most memory that a device has used; null if an earlier case used more, or
                       if the device does not report it
program_memory_bytes   the compiler's plan for the largest program, on one device
error                  instead of the numbers: the reason, for example too little memory
"""

import contextlib
import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokenbridge_jax.benchmark import profiles, programs
from tokenbridge_jax.benchmark.ceilings import Ceilings
from tokenbridge_jax.benchmark.timing import time_calls
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.progress import say

# Number of calls in a profile. If a call takes longer than LONG_SECONDS, it is one.
PROFILED_CALLS = 3
LONG_SECONDS = 1.0

Call = Callable[[], Any]
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to time.

    Attributes:
      name: for people and file names; its first word is the benchmark.
      settings: all choices, as JSON values.
      prepare: makes the inputs and returns the call; the timer waits for the call's result. The
        stack closes what must be closed afterwards.
      work: amount of work in one call: `{"images": 64}` is reported as `images_per_second`.
      flops: matmul FLOPs of one call, counted by hand.
      devices: number of devices that run it.
      overlapped: whether the next call starts before this one has ended.
    """

    name: str
    settings: Mapping[str, Any]
    prepare: Callable[[contextlib.ExitStack], Call]
    work: Mapping[str, int]
    flops: int | float = 0
    devices: int = 1
    overlapped: bool = False


class Reporter:
    """Prints a line for every case; if a case fails, the next one still runs."""

    def __init__(
        self,
        ceilings: Ceilings,
        repeats: int,
        *,
        profile_folder: Path | None = None,
        out: Path | None = None,
    ):
        """Args:
          ceilings: the rates to compare with; they are the first line.
          repeats: number of timings of every case.
          profile_folder: folder for a table `NAME.txt` of each case.
          out: file to which the lines are appended as well.

        Raises:
          UserError: the file cannot be written.
        """
        self._ceilings, self._repeats = ceilings, repeats
        self._profile_folder, self._out = profile_folder, out
        self.emit(ceilings.to_json())

    def emit(self, line: Line) -> None:
        """Prints a line; of several processes, only the first one does."""
        if jax.process_index() > 0:
            return
        text = json.dumps(_rounded(line))
        if self._out:
            try:
                with self._out.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:
                raise storage.write_error(self._out, error) from error
        print(text, flush=True)

    def measure(self, case: Case) -> Line:
        """Measures a case, prints its line and returns it."""
        gc.collect()  # The case may need all memory, and a failed case leaves reference cycles.
        say(f"benchmark: {case.name}")
        line: Line = {"what": case.name.split("_")[0], "settings": dict(case.settings)}
        try:
            with contextlib.ExitStack() as stack:
                call = case.prepare(stack)
                line |= self._numbers(case, call)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            line["error"] = " ".join(str(error).split())[:300] or repr(error)
        self.emit(line)
        return line

    def _numbers(self, case: Case, call: Call) -> Line:
        peak_before, known = programs.peak_memory() or 0, programs.loaded_programs()
        timing = time_calls(call, self._repeats, case.overlapped)
        new, peak = programs.new_programs(known), programs.peak_memory() or 0
        line: Line = {
            "settings": {**case.settings, "calls_per_timing": timing.calls_per_timing},
            "seconds": timing.to_json(),
            "compile_seconds": max(0.0, timing.first - timing.median),
            "cpu_seconds": timing.cpu,
        }
        rates = {f"{name}_per_second": n / timing.median for name, n in case.work.items()}
        line |= rates
        line["flops_by_hand"] = case.flops
        line["flops_by_compiler"] = programs.count_flops(new, case.devices)
        if case.flops:
            peak_flops = self._ceilings.flops_per_second * case.devices
            line["share_of_peak"] = case.flops / timing.median / peak_flops
        if "bytes" in case.work:
            copy = self._ceilings.bytes_per_second * case.devices
            line["share_of_copy"] = rates["bytes_per_second"] / copy
        line["peak_memory_bytes"] = peak if peak > peak_before else None
        line["program_memory_bytes"] = programs.planned_memory(new)
        if self._profile_folder:
            calls = 1 if timing.median > LONG_SECONDS else PROFILED_CALLS
            self._profile(self._profile_folder / f"{case.name}.txt", call, calls, new)
        return line

    def _profile(self, path: Path, call: Call, calls: int, new: Sequence[Any]) -> None:
        try:
            table = profiles.record(call, calls, programs.source_names(new))
        except jax.errors.JaxRuntimeError as error:  # The numbers are valid without it.
            return say(f"benchmark: no {path}: {error}")
        if jax.process_index() == 0:
            storage.write_bytes(path, table.encode())


def _rounded(value: Any) -> Any:
    """Rounds numbers to six digits, which is more than their accuracy."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
