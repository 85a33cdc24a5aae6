"""Mean and covariance of features, in float64."""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped

from tokenbridge_jax.runtime.errors import UserError

# Rows that are converted to float64 together: 50,000 x 2048 of them would take 0.8 GB.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features; the Frechet distance depends on nothing else.

    Raises:
      UserError: on construction, if their shapes do not fit each other, if they contain NaN or
        infinity, or if the covariance is not symmetric.
    """

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "E F"]

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape:
            raise UserError(
                f"a mean of shape {self.mean.shape} and a covariance of shape "
                f"{self.covariance.shape} do not belong together"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UserError("the statistics of the features contain NaN or infinity")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-3, atol=1e-6):
            raise UserError("the covariance is not symmetric")


class Moments:
    """Mean and covariance of features that arrive in batches.

    Rows are summed in blocks of a fixed size, in the order of their arrival, so the result does not
    depend on the batch size, not even in rounding.
    """

    def __init__(self, size: int):
        """`size` is D, the number of features in a row."""
        self.count = 0
        self._broken = 0
        self._block = np.empty((_BLOCK, size))
        self._mean = np.zeros(size)
        self._scatter = np.zeros((size, size))

    def update(self, rows: Shaped[np.ndarray, "n D"]) -> None:
        """Adds the features of n images."""
        while len(rows):
            filled = self.count % _BLOCK
            part, rows = rows[: _BLOCK - filled], rows[_BLOCK - filled :]
            self._block[filled : filled + len(part)] = part
            self._broken += int((~np.isfinite(part).all(axis=1)).sum())
            self.count += len(part)
            if filled + len(part) == _BLOCK:
                self._mean, self._scatter = self._merged(_BLOCK)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of all rows so far.

        Raises:
          UserError: there are fewer than two rows, or some are NaN or infinite.
        """
        if self.count < 2:
            raise UserError(f"statistics need at least 2 images, not {self.count}")
        if self._broken:
            raise UserError(
                f"{self._broken} of {self.count} images have features that are NaN or infinite"
            )
        mean, scatter = self._merged(self.count % _BLOCK)
        return Gaussian(mean, scatter / (self.count - 1))

    def _merged(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scatter with the first `rows` of the block (Chan et al., 1983, eq. 2.1)."""
        if not rows:
            return self._mean, self._scatter
        before = (self.count - 1) // _BLOCK * _BLOCK
        block = self._block[:rows]
        # The first row is subtracted because a mean far from zero would cost precision.
        mean = block[0] + (block - block[0]).mean(axis=0)
        centred = block - mean
        difference = mean - self._mean
        share = rows / (before + rows)
        scatter = self._scatter + centred.T @ centred
        scatter += before * share * np.outer(difference, difference)
        return self._mean + share * difference, scatter


def gaussian(features: Shaped[np.ndarray, "N D"]) -> Gaussian:
    """Mean and unbiased covariance of N images' features.

    Raises:
      UserError: there are fewer than two images, or features that are NaN or infinite.
    """
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.gaussian()
