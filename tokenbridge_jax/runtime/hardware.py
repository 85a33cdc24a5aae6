"""The devices of a job: kind, number, memory, peak rates. Cores and memory of this host."""

import dataclasses
import math
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from tokenbridge_jax.runtime import processes

# Peak dense bf16 matmul FLOP/s of what JAX lists as one device, by a name that `device_kind`
# contains as whole words. The first match counts.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 1153.5e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("T4", 65e12),
    ("V100", 125e12),
)

# Where Linux says what a container may use (cgroup v2); other systems have no such folder.
_LIMITS = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a job: tpu, gpu or cpu, in slices that only the mesh axis `data` joins.

    `memory` has the bytes that a program may use on one, None if they are not known (CPUs).
    """

    kind: str
    platform: str
    number: int
    slices: int = 1
    memory: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} x {self.number}"

    @classmethod
    def at_hand(cls, slices: int) -> "Devices":
        """All devices of the job; the same on every process, which must all call this."""
        device = jax.local_devices()[0]
        limits = processes.gather(str((device.memory_stats() or {}).get("bytes_limit", "")))
        memory = min(map(int, limits)) if all(limits) else None
        return cls(device.device_kind, device.platform, jax.device_count(), slices, memory)


def host_cores() -> int:
    """The cores that this process may use: those of this host, or of its container."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = found or 1
    if limit := _limit("cpu.max"):
        # Microseconds of all cores together in a period, and the period.
        quota, period = limit
        found = min(found, math.ceil(quota / period))
    return found


def host_memory() -> int:
    """Bytes of memory of this host, or of the container that the process is in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_limit("memory.max")])


def _limit(name: str) -> list[int]:
    """The numbers of a limit of the container; none if there is no limit."""
    path = _LIMITS / name
    words = path.read_text().split() if path.exists() else ["max"]
    return [] if words[0] == "max" else list(map(int, words))


def listed_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a kind of device; None if it is not in the table."""
    found = (f for name, f in PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE))
    return next(found, None)


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """Peak matmul FLOP/s of one device, and the source of the number.

    A device that is not in the table, such as a CPU, is measured with a short float32 product. CPU
    devices of one host share its cores, so the rate is divided by their number.
    """
    if flops := listed_flops(device.device_kind):
        return flops, f"{device.device_kind}, bf16, from its data sheet"
    share = jax.local_device_count() if device.platform == "cpu" else 1
    return _measured_flops(device) / share, f"{device.device_kind}, measured with a float32 product"


def _measured_flops(device: jax.Device, size: int = 1024) -> float:
    """Best rate of a few [size, size] products on an otherwise idle device."""
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="default"))
    best = float("inf")
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=[device])):
        x = jax.device_put(np.ones((size, size), np.float32), device)
        product(x).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
