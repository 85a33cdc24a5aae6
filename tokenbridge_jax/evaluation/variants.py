"""Changes of latents before they are decoded: levels, ranges, moved indices."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer

from tokenbridge_jax.quantizer import Codebook, Quantizer
from tokenbridge_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """How latents are changed before they are decoded.

    Attributes:
      quantizer: quantizes the latents; None leaves them unchanged.
      share: the probability that an index is moved.
      delta: the largest move, in levels. All moves from -delta to delta except 0 are equally
        likely. A move beyond the first or last level ends at that level.

    Raises:
      UserError: on construction, if share or delta is out of range, or only one of them is 0.
    """

    quantizer: Quantizer | Codebook | None = None
    share: float = 0.0
    delta: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.delta < 0 or (self.share > 0) != (self.delta > 0):
            raise UserError(
                f"indices cannot be perturbed with share {self.share} and delta {self.delta}: the "
                "share must be above 0 and at most 1, the delta at least 1"
            )


def sweep(
    own: Quantizer | Codebook,
    levels: Sequence[int] = (8, 16, 32, 64),
    ranges: Sequence[float] = (2.0, 3.0, 4.0, 5.0),
    perturbations: Sequence[tuple[float, int]] = (),
) -> tuple[Variant, ...]:
    """The rows of the paper's Table 1: continuous latents, numbers of levels, ranges.

    Args:
      own: the model's quantizer, which is one of the rows. Other numbers of levels have its range,
        other ranges have its number of levels, and perturbations move its indices.
      levels: V of the other rows.
      ranges: R of the other rows.
      perturbations: pairs of a share and a delta; see `Variant`.
    """
    limit = own.maximum
    others = [Quantizer.gaussian(v, limit) for v in levels if v != own.levels]
    by_levels = sorted([*others, own], key=lambda quantizer: quantizer.levels)
    by_range = [Quantizer.gaussian(own.levels, r) for r in ranges if r != limit]
    perturbed = [Variant(own, share, delta) for share, delta in perturbations]
    return (Variant(), *map(Variant, [*by_levels, *by_range]), *perturbed)


def perturbation(text: str) -> tuple[float, int]:
    """The share and the delta of "SHARE:DELTA"; raises `ValueError` for another text."""
    share, delta = text.split(":")
    return float(share), int(delta)


def perturb(
    indices: Integer[np.ndarray, "n L C"],
    numbers: Int[np.ndarray, " n"],
    levels: int,
    variant: Variant,
    seed: int,
) -> Int[np.ndarray, "n L C"]:
    """Moves some indices by the share and delta of `variant`; they stay within 0..V-1.

    The moves of image i depend only on `seed` and i. A larger share moves the same indices and
    more. A larger delta moves them farther in the same direction.
    """
    rngs = [np.random.default_rng((seed, int(number))) for number in numbers]
    shape = 2, *indices.shape[1:]
    chance, place = np.moveaxis(np.stack([rng.random(shape) for rng in rngs]), 1, 0)
    step = np.floor(place * 2 * variant.delta).astype(np.int64) - variant.delta
    step += step >= 0
    moved = np.where(chance < variant.share, indices + step, indices)
    return np.clip(moved, 0, levels - 1)
