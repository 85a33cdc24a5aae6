"""Estimates the time of a program on a slice from the figures of its generation.

Every report prints `ASSUMPTIONS`.
"""

import dataclasses
import math

from tokenbridge_jax.preflight.chips import Slice
from tokenbridge_jax.preflight.hlo import Collective, Program

ASSUMPTIONS = (
    "operations run one after another; each takes the cycles of its compiled schedule at the clock "
    "that the peak implies, or its memory traffic at full bandwidth, if that takes longer",
    "collectives send as in a ring, over all links along the axes that their group spans; an axis "
    "that is not a ring has half the links; those that libtpu starts early overlap with operations",
    "copies have no latency, and chips do not compete for links",
    "input, checkpoints and restarts take no time",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on a device, by cause.

    Attributes:
      products: all products at the peak rate.
      memory: all traffic at the bandwidth of the memory.
      network: all collectives.
      instructions: the cycles that libtpu estimates, at the clock rate.
    """

    products: float
    memory: float
    network: float
    instructions: float

    @property
    def bound(self) -> float:
        """The roofline: the slowest of products, memory and network, if they all overlap."""
        return max(self.products, self.memory, self.network)


def estimate(program: Program, flops: int, peak: float, where: Slice) -> Estimate:
    """Estimates the seconds of a program.

    Args:
      program: the work of a device.
      flops: FLOPs of the device's products.
      peak: FLOP/s of the device.
      where: the slice.
    """
    figures = where.figures
    return Estimate(
        products=flops / peak,
        memory=program.traffic / figures.hbm,
        network=math.fsum(network_seconds(one, where) for one in program.collectives),
        instructions=program.cycles / figures.clock(peak),
    )


def network_seconds(collective: Collective, where: Slice) -> float:
    """The time of all runs of a collective."""
    return collective.sent / (where.figures.ici * links(collective, where))


def links(collective: Collective, where: Slice) -> float:
    """Share of a chip's links that a collective uses, if its group spans the longest axes."""
    needed, share = math.ceil(collective.group / where.figures.devices), 0.0
    for size in sorted(where.shape, reverse=True):
        if needed > 1 or not share:
            share += (1.0 if where.is_ring(size) else 0.5) / where.figures.dimensions
        needed = math.ceil(needed / size)
    return share
