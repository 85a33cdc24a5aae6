"""Calibration of the levels' probabilities: reliability and probability integral transform."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from tokenbridge_jax.evaluation import figures

# Numbers of bins. Guo et al. (2017) use 15 bins of confidences.
CONFIDENCE_BINS, PIT_BINS = 15, 20


class Calibration:
    """Counts of predicted indices.

    Attributes:
      bins: float64 `[3, 15]`, for equal bins of (0, 1]: the number of confidences, their sum, and
        the number of correct indices.
      pit: float64 `[20]`, the number of indices in equal bins of the probability integral
        transform. Let p be the probability of an index, and F the sum of the probabilities of all
        lower levels. The index counts evenly over [F, F + p]. If the probabilities are right, all
        bins have the same count (Czado et al., 2009).
    """

    def __init__(self) -> None:
        self.bins = np.zeros((3, CONFIDENCE_BINS))
        self.pit = np.zeros(PIT_BINS)

    def update(
        self,
        confidence: Float[np.ndarray, "*n"],
        correct: Bool[np.ndarray, "*n"],
        below: Float[np.ndarray, "*n"],
        probability: Float[np.ndarray, "*n"],
    ) -> None:
        """Adds predicted indices.

        Args:
          confidence: the probability of the most likely level.
          correct: whether the index is the most likely level.
          below: the probability of all levels below the index.
          probability: the probability of the index.
        """
        confidence = confidence.ravel().astype(np.float64)
        place = np.ceil(confidence * CONFIDENCE_BINS).astype(np.int64) - 1
        place = np.clip(place, 0, CONFIDENCE_BINS - 1)
        weights = np.ones(len(place)), confidence, correct.ravel()
        self.bins += [np.bincount(place, weight, CONFIDENCE_BINS) for weight in weights]

        low = below.ravel().astype(np.float64)
        # In float32, F + p may exceed 1, and p may be lost when it is added to F.
        high = np.minimum(low + np.maximum(probability.ravel().astype(np.float64), 1e-7), 1)
        low = np.minimum(low, high - 1e-7)
        inner = np.linspace(0, 1, PIT_BINS + 1)[1:-1]
        passed = [np.clip((edge - low) / (high - low), 0, 1).sum() for edge in inner]
        self.pit += np.diff([0, *passed, len(low)])

    def summary(self) -> dict[str, Any]:
        """Returns plain numbers and lists.

        Returns:
          `bins`: their `count`, mean `confidence` and `accuracy` (None in empty bins);
          `expected_calibration_error`: the mean of |confidence - accuracy|, weighted by the count;
          `confidence` and `accuracy`: means over all indices;
          `pit`: the share of the indices in each bin of the transform.
        """
        count, confidence, correct = self.bins
        total = count.sum()
        return {
            "bins": {
                "count": count.astype(np.int64).tolist(),
                "confidence": _means(confidence, count),
                "accuracy": _means(correct, count),
            },
            "expected_calibration_error": float(np.abs(correct - confidence).sum() / total),
            "confidence": float(confidence.sum() / total),
            "accuracy": float(correct.sum() / total),
            "pit": (self.pit / total).tolist(),
        }


def _means(sums: np.ndarray, count: np.ndarray) -> list[float | None]:
    return [float(s / n) if n else None for s, n in zip(sums, count, strict=True)]


def plot(summary: Mapping[str, Any], path: epath.PathLike) -> epath.Path:
    """Plots a `Calibration.summary` as a PNG; returns its path."""
    reliability_ax, pit_ax = figures.make_axes(2)
    bins = summary["bins"]
    used = np.flatnonzero(bins["count"])
    count, confidence, accuracy = (
        np.array(bins[name])[used] for name in ("count", "confidence", "accuracy")
    )
    reliability_ax.plot([0, 1], [0, 1], "--", color=figures.GREY, label="calibrated")
    reliability_ax.plot(confidence, accuracy, color=figures.BLUE, linewidth=1)
    error = f"expected error {summary['expected_calibration_error']:.4f}"
    sizes = 12 + 150 * count / count.max()
    reliability_ax.scatter(
        confidence, accuracy, sizes, color=figures.BLUE, alpha=0.7, clip_on=False, label=error
    )
    reliability_ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence in the most likely level")
    reliability_ax.set_ylabel("share of correct indices")
    reliability_ax.legend(frameon=False, loc="upper left")
    density = np.array(summary["pit"]) * PIT_BINS
    edges = np.linspace(0, 1, PIT_BINS + 1)
    pit_ax.stairs(density, edges, fill=True, color=figures.BLUE)
    pit_ax.axhline(1, color=figures.GREY, linestyle="--", label="calibrated")
    pit_ax.set(xlim=(0, 1), ylim=(0, 1.25 * max(1, density.max())), ylabel="density of indices")
    pit_ax.set_xlabel("probability integral transform")
    pit_ax.legend(frameon=False)
    return figures.save(pit_ax, path)
