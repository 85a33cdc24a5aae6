"""How many positions a training batch hides, and which (paper section 3.3; MAR's mask ratio).

Each batch has one ratio, drawn from a normal (mean 1, standard deviation 0.25) that is truncated to
[0.7, 1]. Every image has its own random order; its first `ceil(ratio L)` entries are hidden.

The host draws the number, because shapes depend on it: under jit a batch with h hidden positions
has M >= h *hidden slots* (rows of the head) and S >= L - h *visible slots* (of the encoder), while
h itself is traced. M is h rounded up to a multiple of `hidden_bucket`, and S fits the smallest h of
that bucket, so every bucket is one compiled program. A small bucket compiles more programs, a large
one computes more padding. With L = 256, in exact expectation over the draw:

  hidden_bucket   programs   unused hidden slots   unused visible slots, with the 64 class tokens
        1            77            0.0 %                  0.0 %
        8            10            1.5 %                  3.4 %
       16             5            3.1 %                  7.1 %
       32             3            5.9 %                 13.3 %
       64             2           10.6 %                 24.1 %
      256             1           13.1 %                 30.3 %
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import scipy
from jaxtyping import Array, Int, PRNGKeyArray

from tokenbridge_jax.loss import MaskDraw
from tokenbridge_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class MaskSampler:
    """Draws the number of hidden positions of every step.

    Attributes:
      positions: L.
      mean: mean of the normal, before truncation.
      std: standard deviation of the normal.
      minimum: the smallest ratio; the largest is 1.
      bucket: the number of hidden slots is a multiple of it, or L.
    """

    positions: int
    mean: float = 1.0
    std: float = 0.25
    minimum: float = 0.7
    bucket: int = 16

    def __post_init__(self):
        if not 0 < self.minimum < 1:
            raise UserError(f"training.mask_min is {self.minimum}; it must be between 0 and 1")
        if self.std <= 0:
            raise UserError(f"training.mask_std is {self.std}; it must be above 0")

    @property
    def fewest_hidden(self) -> int:
        """The smallest number of hidden positions that can be drawn."""
        return math.ceil(self.minimum * self.positions)

    def draw(self, seed: int, step: int) -> MaskDraw:
        """The draw for the batch after `step` updates, a function of `seed` and `step` alone."""
        uniform = np.random.Generator(np.random.Philox(key=[seed, step])).random()
        return self.slots(self._num_hidden(uniform))

    def quantiles(self, count: int) -> list[int]:
        """The numbers of hidden positions at the middles of `count` equally likely ranges."""
        return [self._num_hidden((i + 0.5) / count) for i in range(count)]

    def slots(self, num_hidden: int) -> MaskDraw:
        """A draw of `num_hidden`, with the slots of its bucket."""
        hidden_slots = min(self.positions, -(-num_hidden // self.bucket) * self.bucket)
        fewest = max(self.fewest_hidden, (num_hidden - 1) // self.bucket * self.bucket + 1)
        return MaskDraw(np.int32(num_hidden), hidden_slots, self.positions - fewest)

    def all_slots(self, num_hidden: int) -> MaskDraw:
        """A draw of `num_hidden`, with slots for any number, so that validation is one program."""
        return MaskDraw(np.int32(num_hidden), self.positions, self.positions - self.fewest_hidden)

    def probabilities(self) -> dict[int, float]:
        """The exact probability of every number of hidden positions."""
        counts = np.arange(self.fewest_hidden, self.positions + 1)
        upper = np.minimum(counts / self.positions, 1.0)
        lower = np.maximum((counts - 1) / self.positions, self.minimum)
        low, high = self._cdf(self.minimum), self._cdf(1.0)
        masses = (self._cdf(upper) - self._cdf(lower)) / (high - low)
        return {int(count): float(mass) for count, mass in zip(counts, masses, strict=True)}

    def _cdf(self, ratio: Any) -> Any:
        return scipy.special.ndtr((ratio - self.mean) / self.std)

    def _num_hidden(self, uniform: float) -> int:
        low, high = self._cdf(self.minimum), self._cdf(1.0)
        ratio = self.mean + self.std * scipy.special.ndtri(low + uniform * (high - low))
        return math.ceil(float(np.clip(ratio, self.minimum, 1.0)) * self.positions)


def draw_orders(key: PRNGKeyArray, batch: int, positions: int) -> Int[Array, "B L"]:
    """A random order of the positions for every image.

    It sorts random 32-bit words instead of shuffling rows, so that the batch axis stays a plain
    parallel axis on any mesh. Equal words occur once in 1e5 rows and only fix two entries' order.
    """
    return jax.numpy.argsort(jax.random.bits(key, (batch, positions)), axis=-1)
