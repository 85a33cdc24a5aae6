"""The figures of the TPU generations, and the names of their slices.

Compute, memory and bandwidths are from Google's pages https://cloud.google.com/tpu/docs/v4, v5e,
v5p, v6e and tpu7x, except:

  memory         the memory that libtpu's compiler calls available; the data sheets say more
  ici of v4      from 1.1 PB/s of all-reduce on a pod of 4096 chips, on the page of v4; the other
                 pages give a chip's bandwidth in both directions together, which is halved here
  cycle_flops    FLOPs of a bfloat16 product in a cycle, from the number and size of the matrix
                 units (for v6e and tpu7x the smallest value that agrees with libtpu's cycles). Peak
                 FLOP/s divided by it is the clock, which converts cycles to seconds. So computed,
                 libtpu's cycles of a product of 8192 x 8192 matrices give 70 to 93 % of the peak
"""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from tokenbridge_jax.runtime import environment
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import listed_flops

GIB = 2**30

# Arguments of libtpu that write the schedules of all operations to a folder, and little else.
DUMP = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=^final_(bundles|hlo-static)|deduplication-map"
)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One device of a TPU generation, as JAX counts devices.

    Attributes:
      memory: bytes that a program may use.
      hbm: bytes a second, from or to memory.
      ici: bytes a second that the device can send to its neighbours, over all links together.
      cycle_flops: FLOPs of a bfloat16 product in a clock cycle.
      dimensions: number of axes of a slice's shape.
      ring: an axis of this many chips, or of a multiple, is a closed ring; other axes are lines.
        (In three dimensions all axes or none are rings: slices consist of cubes of 4 x 4 x 4.)
      devices: number in a chip. (The two cores of a v4 or v5p chip are one device.)
      cores: number in a chip, for the names in the cloud: v4-32 has sixteen chips.
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

    def clock(self, peak: float) -> float:
        """Cycles a second, from the peak FLOP/s of the device."""
        return peak / self.cycle_flops


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

# Shapes that the cloud offers, by the number of dimensions.
SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Connected chips of one generation.

    Attributes:
      name: libtpu's name, such as `v5e:16x16`.
      generation: key in `GENERATIONS`.
      shape: number of chips along each axis.
    """

    name: str
    generation: str
    shape: tuple[int, ...]

    @property
    def figures(self) -> Generation:
        """The figures of one device."""
        return GENERATIONS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def is_ring(self, size: int) -> bool:
        """Whether an axis of `size` chips is a closed ring."""
        ring = self.figures.ring
        made_of_cubes = all(other % ring == 0 for other in self.shape)
        return size % ring == 0 and (self.figures.dimensions == 2 or made_of_cubes)


def parse_slice(name: str) -> Slice:
    """Reads `v5e:16x16`, or a name in the cloud: `v5litepod-256`, `v5p-128`.

    Raises:
      UserError: there is no such slice; the message lists the existing ones.
    """
    wanted = name.lower().replace("v5litepod", "v5e")
    generation = re.split("[:-]", wanted)[0]
    if figures := GENERATIONS.get(generation):
        in_cloud = {
            f"{generation}-{math.prod(_sizes(text)) * figures.cores}": f"{generation}:{text}"
            for text in SHAPES[figures.dimensions]
        }
        wanted = in_cloud.get(wanted, wanted)
        if match := re.fullmatch(r"\w+:(\d+(x\d+)*)", wanted):
            shape = _sizes(match[1])
            if len(shape) == figures.dimensions and 0 not in shape:
                return Slice(wanted, generation, shape)
        valid = [*in_cloud.values(), *in_cloud]
    else:
        valid = [f"{key}:{SHAPES[g.dimensions][0]}" for key, g in GENERATIONS.items()]
        valid += ["v5litepod-256", "v5p-128"]
    raise UserError(f"there is no topology '{name}'; there are {', '.join(valid)}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def check_libtpu() -> None:
    """Checks that libtpu is installed, without loading it.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, which compiles for TPUs, is not installed: pip install 'tokenbridge_jax[tpu]'"
        )


def slice_devices(wanted: Slice, dump: Path | None = None) -> list[Any]:
    """Describes the devices of a slice: programs are compiled for them, but cannot run.

    Args:
      wanted: the slice.
      dump: a folder where libtpu writes the schedules of the programs that this process compiles
        (see `profile.read_profile`); it counts in the first call of a process only.

    Raises:
      UserError: libtpu knows no such slice.
    """
    # These let several processes load libtpu, and keep it from asking the host of a TPU.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    environment.enlarge_libtpu_stacks()
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
