"""The TPU generations: their figures, and the names of their slices.

Compute, memory and bandwidths are from Google's pages https://cloud.google.com/tpu/docs/v4, v5e,
v5p, v6e and tpu7x, except:

  memory         what libtpu's compiler calls available, less than the data sheet says
  ici of v4      from 1.1 PB/s of all-reduce on a pod of 4096 chips, on the page of v4; the other
                 pages give a chip's bandwidth in both directions, which is halved here
  cycle_flops    a bfloat16 product's FLOPs in a cycle, from the number and size of the matrix
                 units (on v6e and tpu7x the fewest that libtpu's cycles allow). Peak FLOP/s divided
                 by it is the clock, which turns cycles into seconds. With it, libtpu's cycles of a
                 product of 8192 x 8192 matrices give 70 to 93 % of the peak
"""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import listed_flops

GIB = 2**30

# Arguments of libtpu that write the schedules of all operations to a folder, and little else.
DUMP = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=^final_(bundles|hlo-static)|deduplication-map"
)

# Bytes of a stack of a thread of libtpu's.
STACK = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Generation:
    """One device of a TPU generation, as JAX counts devices.

    Attributes:
      memory: bytes that a program may use.
      hbm: bytes a second, from or to memory.
      ici: bytes a second that it can send to its neighbours, over all links together.
      cycle_flops: FLOPs of a bfloat16 product in a clock cycle.
      devices: in a chip. (A chip of v4 or v5p has two cores that are one device.)
      cores: in a chip, for the cloud's names: v4-32 is sixteen chips.
      ring: an axis of this many chips, or a multiple, is closed to a ring; others are lines. (In
        three dimensions all axes or none: slices are made of cubes of 4 x 4 x 4.)
      dimensions: of a slice's shape.
      matrix_unit: rows and columns of a matrix unit.
      delay_slots: bundles after a branch that run before it is taken, in libtpu's schedules.
      options: further arguments for libtpu.
    """

    memory: int
    hbm: float
    ici: float
    cycle_flops: int
    dimensions: int
    ring: int
    devices: int = 1
    cores: int = 1
    matrix_unit: int = 128
    delay_slots: int = 4
    options: tuple[tuple[str, Any], ...] = ()


GENERATIONS = {
    "v4": Generation(
        int(30.75 * GIB), 1200e9, 270e9, 8 * 2 * 128**2, 3, 4, cores=2,
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Generation(int(15.75 * GIB), 819e9, 200e9, 4 * 2 * 128**2, 2, 16),
    "v5p": Generation(int(95.74 * GIB), 2765e9, 600e9, 8 * 2 * 128**2, 3, 4, cores=2),
    "v6e": Generation(int(31.25 * GIB), 1638e9, 400e9, 4 * 2 * 256**2, 2, 16, matrix_unit=256),
    "tpu7x": Generation(
        int(94.75 * GIB), 3690e9, 300e9, 4 * 2 * 256**2, 3, 4, devices=2, cores=2,
        matrix_unit=256, delay_slots=1,
    ),
}  # fmt: skip

# The shapes that clouds offer, by the number of dimensions.
SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one generation that are wired together.

    Attributes:
      name: `v5e:16x16`, as libtpu calls it.
      generation: its key in `GENERATIONS`.
      shape: chips along each axis.
    """

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def figures(self) -> Generation:
        """Of one device."""
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    def is_ring(self, size: int) -> bool:
        """Whether an axis of `size` chips is closed to a ring."""
        ring = self.figures.ring
        made_of_cubes = all(other % ring == 0 for other in self.shape)
        return size % ring == 0 and (self.figures.dimensions == 2 or made_of_cubes)


def parse_slice(name: str) -> Slice:
    """Reads `v5e:16x16`, or a name of the cloud's: `v5litepod-256`, `v5p-128`.

    Raises:
      UserError: there is no such slice; the message lists those there are.
    """
    wanted = name.lower().replace("v5litepod", "v5e")
    generation, colon, text = wanted.partition(":")
    if not colon:
        generation, _, cores = wanted.partition("-")
    if figures := GENERATIONS.get(generation):
        shapes = SHAPES[figures.dimensions]
        by_cores = {str(math.prod(_sizes(text)) * figures.cores): text for text in shapes}
        if not colon:
            text = by_cores.get(cores, "")
        if re.fullmatch(r"\d+(x\d+)*", text):
            shape = _sizes(text)
            if len(shape) == figures.dimensions and 0 not in shape:
                return Slice(f"{generation}:{text}", generation, shape)
        valid = [f"{generation}:{text}" for text in shapes]
        valid += [f"{generation}-{cores}" for cores in by_cores]
    else:
        valid = [f"{key}:{SHAPES[g.dimensions][0]}" for key, g in GENERATIONS.items()]
        valid += ["v5litepod-256", "v5p-128"]
    raise UserError(f"there is no topology '{name}'; there are {', '.join(valid)}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def check_libtpu() -> None:
    """Looks for libtpu without loading it.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, which compiles for TPUs, is not installed: pip install 'tokenbridge_jax[tpu]'"
        )


def slice_devices(wanted: Slice, dump: Path | None = None) -> list[Any]:
    """Devices of a slice that nobody has: programs are compiled for them and never run.

    Args:
      wanted: the slice.
      dump: a folder where libtpu writes the schedules of the programs that this process compiles
        (see `profile.read_profile`); it counts in the first call of a process only.

    Raises:
      UserError: libtpu knows no such slice.
    """
    # Several processes may load libtpu; these replace its questions to a TPU's host.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    # The stacks it gives its own threads overflow on some programs (0.0.42.1: L on v6e-64).
    if "stack_size" not in (given := os.environ.get("LIBTPU_INIT_ARGS", "")):
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} --fibers_default_thread_stack_size={STACK}"
    if dump:
        os.environ["LIBTPU_INIT_ARGS"] += " " + DUMP.format(folder=dump)
    options = dict(wanted.figures.options)
    if wanted.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(wanted.name, "tpu", **options).devices)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"libtpu knows no topology '{wanted.name}': {reason}") from error


def peak_flops(device: Any) -> float:
    """bfloat16 FLOP/s of one device."""
    flops = listed_flops(device.device_kind)
    assert flops, device.device_kind
    return flops
