"""Times calls."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

# Shorter calls are timed in runs of about RUN_SECONDS. Otherwise the clock and the host's dispatch
# would be measured instead of the device.
SHORT_SECONDS = 20e-3
RUN_SECONDS = 50e-3

# FEWEST timings are enough when they add up to this: 256 sampling steps take a minute.
ENOUGH_SECONDS = 30.0
FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """The result of `time_calls`.

    Attributes:
      first: seconds of the first call, including compilation.
      repeats: seconds of one call, for every later timing.
      calls_per_timing: number of calls in each timing; its seconds are divided by this number.
      cpu: CPU seconds of one call, over all threads of this process.
    """

    first: float
    repeats: Sequence[float]
    calls_per_timing: int
    cpu: float

    @property
    def median(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.repeats)

    def to_json(self) -> dict[str, int | float]:
        """Median, min and max of the repeats, and their number."""
        low, high = min(self.repeats), max(self.repeats)
        return {"median": self.median, "min": low, "max": high, "repeats": len(self.repeats)}


def time_calls(call: Callable[[], Any], repeats: int, overlapped: bool = False) -> Timing:
    """Times `call` `repeats` times after a first call; it waits for the arrays that are returned.

    Calls of many seconds are timed less often: FEWEST times, or until ENOUGH_SECONDS have passed.

    `overlapped` starts every call before the previous one has ended, as a training loop does. The
    time between two results is then that of the device alone. The number of timings is not reduced.
    """
    first = _run(call, 1)
    if overlapped:
        return _time_overlapped(call, repeats, first)
    cpu_start = time.process_time()
    seconds = [_run(call, 1) for _ in range(min(2, repeats))]
    calls = 1
    if min(seconds) < SHORT_SECONDS:
        calls = math.ceil(RUN_SECONDS / max(min(seconds), 1e-6))
        cpu_start, seconds = time.process_time(), []
    while len(seconds) < repeats and (
        len(seconds) < FEWEST or calls * sum(seconds) < ENOUGH_SECONDS
    ):
        seconds.append(_run(call, calls) / calls)
    cpu = (time.process_time() - cpu_start) / (calls * len(seconds))
    return Timing(first, seconds, calls, cpu)


def _time_overlapped(call: Callable[[], Any], repeats: int, first: float) -> Timing:
    jax.block_until_ready(call())
    cpu_start = time.process_time()
    pending, times = call(), []
    for _ in range(repeats + 1):
        following = call()
        jax.block_until_ready(pending)
        times.append(time.perf_counter())
        pending = following
    jax.block_until_ready(pending)
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return Timing(first, seconds, 1, (time.process_time() - cpu_start) / (repeats + 2))


def _run(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - start
