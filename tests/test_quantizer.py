"""The quantizer against brute force."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens_quantizer import quantizer_groups
from scipy import integrate, stats

from tokenbridge_jax.quantizer import Quantizer, gaussian_boundaries
from tokenbridge_jax.runtime.errors import UserError

GOLDEN = Path(__file__).parent / "goldens" / "quantizer.npz"


def brute_force(quantizer: Quantizer, x: np.ndarray) -> np.ndarray:
    """The reference: the float32 map, then the smallest distance, and the lowest index on a tie."""
    low, extent = np.float32(quantizer.minimum), np.float32(quantizer.maximum - quantizer.minimum)
    with np.errstate(over="ignore"):
        scaled = (x - low) / extent * np.float32(6) - np.float32(3)
    scaled = np.clip(scaled, np.float32(-3), np.float32(3))
    values = np.asarray(quantizer.level_values, np.float32)
    return np.concatenate(
        [np.argmin(np.abs(part[:, None] - values), axis=1) for part in np.array_split(scaled, 16)]
    )


def hard_points(quantizer: Quantizer, rng: np.random.Generator) -> np.ndarray:
    """Levels, midpoints, thresholds, range ends, zeros, infinities, and the floats next to each."""
    levels = quantizer.dequantized_levels
    midpoints = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    ends = np.float32([quantizer.minimum, quantizer.maximum, 0.0, -0.0, 1e30, -1e30])
    points = np.concatenate([levels, midpoints, quantizer.thresholds, ends])
    beside = [points]
    for direction in (-np.inf, np.inf):
        beside.append(np.nextafter(points, np.float32(direction)))
        beside.append(np.nextafter(beside[-1], np.float32(direction)))
    spread = rng.uniform(quantizer.minimum - 1, quantizer.maximum + 1, 3000).astype(np.float32)
    return np.concatenate([*beside, spread, np.float32([np.inf, -np.inf])])


def test_golden_values_and_boundaries_to_the_bit():
    for quantizer, golden in quantizer_groups(GOLDEN):
        np.testing.assert_array_equal(quantizer.dequantize(golden["indices"]), golden["values"])
        np.testing.assert_array_equal(quantizer.boundaries(), golden["boundaries"])


@pytest.mark.parametrize("levels", [2, 3, 5, 64, 256, 257, 741, 1451, 4096])
@pytest.mark.parametrize("limits", [(-5.0, 5.0), (-4.3, 2.6), (0.0, 1.0), (1e9, 1e9 + 300)])
def test_equals_brute_force(levels: int, limits: tuple[float, float]):
    values = Quantizer.gaussian(levels).level_values
    quantizer = Quantizer(values, *limits)
    x = hard_points(quantizer, np.random.default_rng(levels))
    expected = brute_force(quantizer, x)
    found = quantizer.quantize(x)
    assert found.dtype == quantizer.index_dtype == (np.uint8 if levels <= 256 else np.uint16)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(quantizer.quantize)(x), expected)


def test_equals_brute_force_on_any_level_table():
    rng = np.random.default_rng(0)
    for levels in (2, 3, 7, 33, 500):
        # Uneven distances and some equal levels; then the smallest distances allowed.
        uneven = np.sort(rng.choice(np.arange(-3, 1, 3e-3), levels)).astype(np.float32)
        close = np.float32(2.9 + np.arange(levels) * 2.5e-6)
        for values in (uneven, close):
            quantizer = Quantizer(tuple(values.tolist()), -1.0, 7.0)
            x = hard_points(quantizer, rng)
            np.testing.assert_array_equal(quantizer.quantize(x), brute_force(quantizer, x))


def test_nan_inside_a_program_is_the_last_index_that_any_latent_has():
    for values, last in (((-1.0, 0.0, 1.0), 2), ((-1.0, 0.0, 1.0, 1.0, 1.0), 2)):
        assert int(jax.jit(Quantizer(values).quantize)(jnp.float32(np.nan))) == last


def test_levels_are_bin_means():
    quantizer = Quantizer.gaussian(16)
    edges = quantizer.boundaries().astype(np.float64)
    assert (edges[0], edges[-1]) == (-3, 3)
    for level, low, high in zip(quantizer.level_values, edges, edges[1:], strict=False):
        moment = integrate.quad(lambda t: t * stats.norm.pdf(t), low, high)[0]
        mass = integrate.quad(stats.norm.pdf, low, high)[0]
        assert level == pytest.approx(moment / mass, abs=1e-5)


def test_every_number_of_levels_gives_ordered_levels_within_their_bins():
    for levels in range(2, 4097, 7):
        values = np.asarray(Quantizer.gaussian(levels).level_values, np.float32)
        edges = gaussian_boundaries(levels)
        assert (np.diff(values) >= 0).all(), levels
        inside = (values >= edges[:-1]) & (values <= edges[1:])
        # Levels of bins that clipping made (nearly) empty may be +-3 instead.
        assert (inside | (np.abs(values) == 3)).all(), levels


def test_dequantized_levels_quantize_to_themselves():
    quantizer = Quantizer.gaussian(512, range=3.7)
    indices = np.arange(512, dtype=np.uint16)
    np.testing.assert_array_equal(quantizer.quantize(quantizer.dequantize(indices)), indices)


def test_infinities_clip_and_nan_is_an_error():
    quantizer = Quantizer.gaussian(64)
    np.testing.assert_array_equal(quantizer.quantize(np.float32([-np.inf, np.inf])), [0, 63])
    for asarray in (np.asarray, jnp.asarray):
        with pytest.raises(UserError, match="NaN"):
            quantizer.quantize(asarray([0.0, np.nan], np.float32))
    assert np.isnan(quantizer.dequantize(np.uint8([64]))).all()


def test_clipped_flags():
    x = np.float32([-5.1, -5.0, 0.0, 5.0, 5.1, np.inf, -np.inf])
    expected = [True, False, False, False, True, True, True]
    np.testing.assert_array_equal(Quantizer.gaussian(8).clipped(x), expected)


def test_no_array_of_distances():
    quantizer, x = Quantizer.gaussian(4096), jnp.zeros((4, 8192))
    lowered = jax.jit(quantizer.quantize).lower(x)
    shapes = re.findall(r"tensor<([\dx]+)x\w+>", lowered.as_text())
    compiled = lowered.compile()
    shapes += [s.replace(",", "x") for s in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())]
    sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
    assert max(sizes) == x.size  # distances to all levels would be 4096 times that
    assert compiled.memory_analysis().temp_size_in_bytes <= 32 * x.size


def test_json_is_exact_and_equality_is_by_value():
    quantizer = Quantizer.gaussian(100, range=4.1)
    again = Quantizer.from_json(json.loads(json.dumps(quantizer.to_json())))
    assert again == quantizer
    assert hash(again) == hash(quantizer)
    np.testing.assert_array_equal(again.thresholds, quantizer.thresholds)
    assert quantizer != Quantizer.gaussian(100)


@pytest.mark.parametrize(
    ("values", "limits", "message"),
    [
        ((0.0,), (-5, 5), "1 levels"),
        ((1.0, 0.0), (-5, 5), "not decrease"),
        ((0.0, 1e-7), (-5, 5), "apart"),
        ((0.0, 3.5), (-5, 5), "within"),
        ((0.0, float("nan")), (-5, 5), "within"),
        ((0.0, 1.0), (5, -5), "increasing"),
        ((0.0, 1.0), (-5, float("inf")), "finite"),
    ],
)
def test_invalid_levels_and_ranges_are_refused(values, limits, message):
    with pytest.raises(UserError, match=message):
        Quantizer(values, *map(float, limits))


@pytest.mark.parametrize("levels", [1, 4097])
def test_number_of_levels_is_limited(levels: int):
    with pytest.raises(UserError, match="2 to 4096"):
        Quantizer.gaussian(levels)
