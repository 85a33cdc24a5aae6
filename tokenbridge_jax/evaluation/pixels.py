"""PSNR and SSIM of pairs of uint8 images; the range of the pixels is 255."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import uniform_filter

WINDOW = 7


def psnr(
    one: UInt8[np.ndarray, "N H W C"], other: UInt8[np.ndarray, "N H W C"]
) -> Float[np.ndarray, " N"]:
    """Peak signal-to-noise ratio of every pair in decibels, float64; infinite for equal images.

    The PSNR of a set is usually the mean over its images, not that of the mean error.
    """
    error = (one.astype(np.float64) - other) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error.mean(axis=(1, 2, 3)))


def ssim(
    one: UInt8[np.ndarray, "N H W C"], other: UInt8[np.ndarray, "N H W C"]
) -> Float[np.ndarray, " N"]:
    """Structural similarity of every pair (Wang et al., 2004), float64, the mean over channels.

    As in scikit-image by default, windows are 7 x 7 with equal weights, and covariances are
    unbiased. Windows that extend beyond the border do not count.
    """
    with ThreadPoolExecutor() as threads:
        return np.array(list(threads.map(_ssim, one, other)))


def _ssim(one: UInt8[np.ndarray, "H W C"], other: UInt8[np.ndarray, "H W C"]) -> float:
    def mean(x: np.ndarray) -> np.ndarray:
        border = WINDOW // 2
        return uniform_filter(x, (WINDOW, WINDOW, 1))[border:-border, border:-border]

    return float(similarity(one.astype(np.float64), other.astype(np.float64), mean).mean())


def similarity(a: Any, b: Any, mean: Callable[[Any], Any], origin: float = 0.0) -> Any:
    """SSIM of every window, for arrays of NumPy or JAX.

    Args:
      a: the pixels minus `origin`, as floats.
      b: those of the other image.
      mean: over every window.
      origin: a value near the pixels makes their squares small, which float32 needs.
    """
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    variances = unbiased * (mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = mean_a + origin, mean_b + origin
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return brightness * (2 * covariance + c2) / (variances + c2)
