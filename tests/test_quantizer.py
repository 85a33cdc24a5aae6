"""The quantizer against brute force, and the channel order and statistics against plain numpy."""

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

from tokenbridge_jax.quantizer import (
    KL16_CHANNEL_ORDER,
    ChannelSpectrum,
    ChannelStatistics,
    Quantizer,
    channel_order_by_frequency,
    gaussian_boundaries,
    resolve_channel_order,
)
from tokenbridge_jax.runtime.errors import UserError

GOLDEN = Path(__file__).parent / "goldens" / "quantizer.npz"


def brute_force(quantizer: Quantizer, x: np.ndarray) -> np.ndarray:
    """The reference: float32 map, then argmin over all distances, the first on a tie."""
    low, extent = np.float32(quantizer.minimum), np.float32(quantizer.maximum - quantizer.minimum)
    scaled = (x - low) / extent * np.float32(6) - np.float32(3)
    scaled = np.clip(scaled, np.float32(-3), np.float32(3))
    values = np.asarray(quantizer.level_values, np.float32)
    return np.concatenate(
        [np.argmin(np.abs(part[:, None] - values), axis=1) for part in np.array_split(scaled, 16)]
    )


def hard_points(quantizer: Quantizer, rng: np.random.Generator) -> np.ndarray:
    """Levels, midpoints, thresholds, range ends, zeros, infinities and the floats beside each."""
    levels = quantizer.dequantized_levels
    midpoints = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    thresholds = quantizer.thresholds[~np.isnan(quantizer.thresholds)]
    ends = np.float32([quantizer.minimum, quantizer.maximum, 0.0, -0.0, 1e30, -1e30])
    points = np.concatenate([levels, midpoints, thresholds, ends])
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
    with np.errstate(over="ignore"):
        expected = brute_force(quantizer, x)
    found = quantizer.quantize(x)
    assert found.dtype == quantizer.index_dtype == (np.uint8 if levels <= 256 else np.uint16)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(quantizer.quantize)(x), expected)


def test_equals_brute_force_on_any_level_table():
    rng = np.random.default_rng(0)
    for levels in (2, 3, 7, 33, 500):
        # Unevenly spaced, off centre, some of them equal; as close as they may be, in one place.
        uneven = np.sort(rng.choice(np.arange(-3, 1, 3e-3), levels)).astype(np.float32)
        close = np.float32(2.9 + np.arange(levels) * 2.5e-6)
        for values in (uneven, close):
            assert_brute_force(Quantizer(tuple(values.tolist()), -1.0, 7.0), rng)


def assert_brute_force(quantizer: Quantizer, rng: np.random.Generator) -> None:
    x = hard_points(quantizer, rng)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(quantizer.quantize(x), brute_force(quantizer, x))


def test_nan_inside_a_program_is_the_last_index_that_any_latent_has():
    for values, last in (((-1.0, 0.0, 1.0), 2), ((-1.0, 0.0, 1.0, 1.0, 1.0), 2)):
        assert int(jax.jit(Quantizer(values).quantize)(jnp.float32(np.nan))) == last


def test_levels_are_bin_means():
    quantizer = Quantizer.gaussian(16)
    edges = quantizer.boundaries().astype(np.float64)
    assert edges[0] == -3
    assert edges[-1] == 3
    for i, level in enumerate(quantizer.level_values):
        low, high = edges[i], edges[i + 1]
        moment = integrate.quad(lambda t: t * stats.norm.pdf(t), low, high)[0]
        mass = integrate.quad(stats.norm.pdf, low, high)[0]
        assert level == pytest.approx(moment / mass, abs=1e-5)


def test_every_number_of_levels_gives_ordered_levels_within_their_bins():
    for levels in range(2, 4097, 7):
        values = np.asarray(Quantizer.gaussian(levels).level_values, np.float32)
        edges = gaussian_boundaries(levels)
        assert (np.diff(values) >= 0).all(), levels
        inside = (values >= edges[:-1]) & (values <= edges[1:])
        # Only bins that clipping made (nearly) empty may stand on +-3 instead.
        assert (inside | (np.abs(values) == 3)).all(), levels


def test_dequantized_levels_quantize_to_themselves():
    quantizer = Quantizer.gaussian(512, range=3.7)
    indices = np.arange(512, dtype=np.uint16)
    np.testing.assert_array_equal(quantizer.quantize(quantizer.dequantize(indices)), indices)


def test_infinities_clip_and_nan_is_an_error():
    quantizer = Quantizer.gaussian(64)
    np.testing.assert_array_equal(quantizer.quantize(np.float32([-np.inf, np.inf])), [0, 63])
    with pytest.raises(UserError, match="NaN"):
        quantizer.quantize(np.float32([0.0, np.nan]))
    with pytest.raises(UserError, match="NaN"):
        quantizer.quantize(jnp.array([0.0, jnp.nan]))
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
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


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
def test_nonsense_is_refused(values, limits, message):
    with pytest.raises(UserError, match=message):
        Quantizer(values, *map(float, limits))


@pytest.mark.parametrize("levels", [1, 4097])
def test_number_of_levels_is_limited(levels: int):
    with pytest.raises(UserError, match="2 to 4096"):
        Quantizer.gaussian(levels)


def _waves(frequencies: list[float], rng: np.random.Generator, size: int = 16) -> np.ndarray:
    """Latents whose channel c is a wave of `frequencies[c]` cycles an image, and noise."""
    places = np.arange(size) / size
    phase = rng.uniform(0, 2 * np.pi, (6, 1, 1, len(frequencies)))
    waves = np.sin(2 * np.pi * places[None, :, None, None] * np.array(frequencies) + phase)
    waves = np.broadcast_to(waves, (6, size, size, len(frequencies)))
    # The finer the wave, the more white noise: shares are then all different.
    noise = rng.normal(size=waves.shape) * (0.1 + 0.05 * np.array(frequencies))
    return (waves + noise).astype(np.float32)


def test_channel_order_of_known_channels():
    rng = np.random.default_rng(0)
    latents = _waves([7, 1, 2, 0], rng)
    latents[..., 3] = rng.normal(size=latents.shape[:3])  # white: a few low of many frequencies
    latents[..., 0] += 100.0  # a constant says nothing about an image
    assert channel_order_by_frequency(latents) == (1, 2, 3, 0)


def test_spectrum_equals_direct_sums_and_streams():
    rng = np.random.default_rng(1)
    latents = (rng.normal(size=(12, 8, 6, 5)) + np.arange(5)).astype(np.float32)
    latents[..., 1] = np.cumsum(latents[..., 1], axis=1)
    streamed = ChannelSpectrum(5)
    for part in np.split(latents, [1, 2, 7]):
        streamed.update(part)

    centred = latents.astype(np.float64) - latents.astype(np.float64).mean(axis=(0, 1, 2))
    low, total = np.zeros(5), np.zeros(5)
    for y in range(8):
        for x in range(6):
            wave = np.exp(-2j * np.pi * (np.arange(8)[:, None] * y / 8 + np.arange(6) * x / 6))
            energy = (np.abs(np.einsum("bhwc,hw->bc", centred, wave)) ** 2).sum(axis=0)
            total += energy
            if np.hypot(min(y, 8 - y) / 4, min(x, 6 - x) / 3) <= 0.25:
                low += energy
    np.testing.assert_allclose(streamed.shares(), low / total, rtol=1e-9)


def test_channel_order_settings():
    assert resolve_channel_order("kl16", 16) == KL16_CHANNEL_ORDER
    assert sorted(KL16_CHANNEL_ORDER) == list(range(16))
    assert resolve_channel_order("identity", 3) == (0, 1, 2)
    for setting in ([2, 0, 1], "(2,0,1)", "[2, 0, 1]"):
        assert resolve_channel_order(setting, 3) == (2, 0, 1)
    spectrum = ChannelSpectrum(3)
    spectrum.update(_waves([5, 1, 2], np.random.default_rng(2)))
    assert resolve_channel_order("frequency", 3, spectrum) == (1, 2, 0)
    wrong = ["frequencies", "frequency", (0, 0, 1), "(0, 0, 1)", "(0.0, 1, 2)", "7", "('a', 1)"]
    wrong += [("2", "0", "1"), (2, "0", 1), (0.0, 1, 2)]
    for setting, channels in [("kl16", 4), *((setting, 3) for setting in wrong)]:
        with pytest.raises(UserError):
            resolve_channel_order(setting, channels)


def test_statistics_against_direct_numpy():
    rng = np.random.default_rng(3)
    indices = np.minimum(rng.geometric(0.3, (40, 9, 3)), 15).astype(np.uint8)
    indices[..., 2] = 7
    clipped = rng.random((40, 9, 3)) < 0.1
    first, second = ChannelStatistics(3, 16), ChannelStatistics(3, 16)
    first.update(indices[:11], clipped[:11])
    second.update(indices[11:30], clipped[11:30].sum(axis=1))  # counts do as well as flags
    second.update(indices[30:], clipped[30:])
    first.merge(ChannelStatistics.from_json(json.loads(json.dumps(second.to_json()))))

    summary = first.summary()
    entropies = [
        stats.entropy(np.bincount(indices[..., c].ravel(), minlength=16), base=2) for c in range(3)
    ]
    assert summary["latents"] == indices.size
    np.testing.assert_allclose(summary["bits_by_channel"], entropies, atol=1e-12)
    assert summary["bits_per_channel"] == pytest.approx(np.mean(entropies))
    assert summary["clipped_share"] == pytest.approx(clipped.mean())
    np.testing.assert_allclose(summary["clipped_share_by_channel"], clipped.mean(axis=(0, 1)))
    used = [len(np.unique(indices[..., c])) for c in range(3)]
    assert summary["levels_used_by_channel"] == used
    assert used[2] == 1
    assert summary["bits_by_channel"][2] == 0
    json.dumps(summary)


def test_statistics_refuse_what_does_not_fit():
    statistics = ChannelStatistics(2, 4)
    with pytest.raises(ValueError, match="4 levels"):
        statistics.update(np.array([[0, 4]]), np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match="merge"):
        statistics.merge(ChannelStatistics(2, 8))
    assert ChannelStatistics(2, 4).summary()["clipped_share"] == 0
