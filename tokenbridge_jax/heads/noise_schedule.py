"""The noise of a diffusion process (Ho et al., 2020; Nichol & Dhariwal, 2021), in float64.

Step t of T adds noise of variance beta_t: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, where
abar_t is the product of 1 - beta over the steps up to t. Steps are counted from 0.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

# A larger beta would make the last steps of the cosine schedule singular.
_MAX_BETA = 0.999


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variances of the steps, and what follows from them. All arrays are float64 `[T]`.

    Attributes:
      betas: the variance that each step adds.
      timesteps: the number that each step has for the network.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @classmethod
    def cosine(cls, steps: int = 1000) -> "NoiseSchedule":
        """The schedule of Nichol & Dhariwal, eq. 17, with s = 0.008."""

        def remaining(share: float) -> float:
            return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [1 - remaining((t + 1) / steps) / remaining(t / steps) for t in range(steps)]
        return cls(np.minimum(betas, _MAX_BETA), np.arange(steps))

    def respaced(self, count: int) -> "NoiseSchedule":
        """A schedule of `count` (2 or more) of these steps, evenly spaced, from first to last."""
        stride = (len(self.betas) - 1) / (count - 1)
        # Added up as in the release, whose rounding decides between two neighbours.
        places = itertools.accumulate([stride] * (count - 1), initial=0.0)
        chosen = np.array([round(place) for place in places])
        kept = self.signal[chosen]
        betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
        return NoiseSchedule(betas, self.timesteps[chosen])

    @functools.cached_property
    def signal(self) -> np.ndarray:
        """The share of the variance of x_t that is the data's: abar_t."""
        return np.cumprod(1 - self.betas)

    @functools.cached_property
    def signal_before(self) -> np.ndarray:
        """That of the step before; 1 before the first."""
        return np.concatenate([[1.0], self.signal[:-1]])

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Of x_{t-1}, given x_t and x_0 (Ho et al., eq. 7)."""
        return self.betas * (1 - self.signal_before) / (1 - self.signal)

    @functools.cached_property
    def posterior_logvar(self) -> np.ndarray:
        """The logarithm of that; the first, whose variance is 0, has the second's."""
        variance = self.posterior_variance
        return np.log(np.concatenate([variance[1:2], variance[1:]]))

    @functools.cached_property
    def posterior_of_data(self) -> np.ndarray:
        """The factor of x_0 in the mean of x_{t-1}, given x_t and x_0."""
        return self.betas * np.sqrt(self.signal_before) / (1 - self.signal)

    @functools.cached_property
    def posterior_of_noisy(self) -> np.ndarray:
        """The factor of x_t in that mean."""
        return (1 - self.signal_before) * np.sqrt(1 - self.betas) / (1 - self.signal)
