"""Mean and covariance of features, in float64."""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped

from tokenbridge_jax.errors import UserError

# Rows that are float64 at a time: 50,000 x 2048 of them would be 0.8 GB.
_BLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and covariance, which is all that the Frechet distance sees of features.

    Raises:
      UserError: on construction, if they do not fit each other, or hold NaN or infinity.
    """

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "E F"]

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.covariance.shape != (size, size):
            raise UserError(
                f"a mean of shape {self.mean.shape} and a covariance of shape "
                f"{self.covariance.shape} do not belong together"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UserError("the statistics of the features hold NaN or infinity")


def gaussian(features: Shaped[np.ndarray, "N D"]) -> Gaussian:
    """Mean and unbiased covariance of N images' features.

    Raises:
      UserError: there are fewer than two images, or features that are NaN or infinite.
    """
    count, size = features.shape
    if count < 2:
        raise UserError(f"statistics need at least 2 images, not {count}")
    # About the first row: what is far from zero compared with its spread would lose digits.
    pivot = features[0].astype(np.float64)
    total, products, broken = np.zeros(size), np.zeros((size, size)), 0
    for start in range(0, count, _BLOCK):
        block = features[start : start + _BLOCK] - pivot
        broken += int((~np.isfinite(block).all(axis=1)).sum())
        total += block.sum(axis=0)
        products += block.T @ block
    if broken:
        raise UserError(f"{broken} of {count} images have features that are NaN or infinite")
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    return Gaussian(pivot + mean, covariance)
