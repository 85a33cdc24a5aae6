"""The channel order and the channel statistics, compared with plain numpy."""

import json

import numpy as np
import pytest
from scipy import stats

from tokenbridge_jax.channels import (
    KL16_CHANNEL_ORDER,
    ChannelSpectrum,
    ChannelStatistics,
    resolve_channel_order,
)
from tokenbridge_jax.runtime.errors import UserError


def _waves(frequencies: list[float], rng: np.random.Generator, size: int = 16) -> np.ndarray:
    """Latents whose channel c is a wave of `frequencies[c]` cycles per image, plus noise."""
    places = np.arange(size) / size
    phase = rng.uniform(0, 2 * np.pi, (6, 1, 1, len(frequencies)))
    waves = np.sin(2 * np.pi * places[None, :, None, None] * np.array(frequencies) + phase)
    waves = np.broadcast_to(waves, (6, size, size, len(frequencies)))
    # Finer waves get more white noise, so that all shares differ.
    noise = rng.normal(size=waves.shape) * (0.1 + 0.05 * np.array(frequencies))
    return (waves + noise).astype(np.float32)


def test_channel_order_of_known_channels():
    rng = np.random.default_rng(0)
    latents = _waves([7, 1, 2, 0], rng)
    latents[..., 3] = rng.normal(size=latents.shape[:3])  # white: a few low of many frequencies
    latents[..., 0] += 100.0  # a constant carries no information about an image
    spectrum = ChannelSpectrum(4)
    spectrum.update(latents)
    assert spectrum.order() == (1, 2, 3, 0)


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
