"""Channels of latents: their spectrum, their order for the head, and how they use their levels."""

import ast
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from tokenbridge_jax.runtime.errors import UserError

# Published order of KL-16's channels: falling share of low-frequency energy.
KL16_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)

# Frequencies up to this share of Nyquist's count as low: 2 of 8 cycles an image on a 16x16 grid.
LOW_FREQUENCY = 0.25


class ChannelSpectrum:
    """Share of low-frequency energy of every channel, measured batch by batch (paper, appendix).

    Energy is that of the 2D FFT over positions. A frequency is low if its radius `hypot(f_y, f_x)`
    is at most `LOW_FREQUENCY` times Nyquist's. The mean of a channel over all images carries no
    information about any of them, so its energy is left out. The difference of an image's own mean
    from it counts as low.
    """

    def __init__(self, channels: int):
        self._images = 0
        self._low_energy = np.zeros(channels, np.float64)
        self._energy = np.zeros(channels, np.float64)
        self._mean = np.zeros(channels, np.float64)  # Of the images so far.

    def update(self, latents: Float[np.ndarray, "B h w C"]) -> None:
        """Adds a batch; every batch must have the same h and w."""
        batch, height, width, _ = latents.shape
        # Energies are relative to the running mean, and corrected as it moves (Chan et al.).
        latents = latents.astype(np.float64)
        mean = latents.mean(axis=(0, 1, 2))
        energy_BhwC = np.abs(np.fft.fft2(latents - mean, axes=(1, 2), norm="ortho")) ** 2
        f_y, f_x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
        is_low = np.hypot(f_y, f_x) <= LOW_FREQUENCY * 0.5 + 1e-9

        total = self._images + batch
        moved = (mean - self._mean) ** 2 * height * width * self._images * batch / total
        self._low_energy += energy_BhwC[:, is_low].sum(axis=(0, 1)) + moved
        self._energy += energy_BhwC.sum(axis=(0, 1, 2)) + moved
        self._mean += (mean - self._mean) * batch / total
        self._images = total

    def shares(self) -> Float[np.ndarray, " C"]:
        """Share of low-frequency energy of every channel; 0 for a channel that never changes."""
        return self._low_energy / np.where(self._energy > 0, self._energy, 1.0)

    def order(self) -> tuple[int, ...]:
        """Channels from the highest share to the lowest; the lower channel first on a tie."""
        return tuple(np.argsort(-self.shares(), kind="stable").tolist())


class ChannelStatistics:
    """Counts how often every channel uses each level, and how many latents were clipped."""

    def __init__(self, channels: int, levels: int):
        self.counts = np.zeros((channels, levels), np.int64)
        self.clipped = np.zeros(channels, np.int64)

    def update(
        self,
        indices: Integer[np.ndarray, "... C"],
        clipped: Bool[np.ndarray, "... C"] | Integer[np.ndarray, "... C"],
    ) -> None:
        """Adds indices, and which of their latents were clipped: flags, or counts `[..., C]`.

        Raises:
          ValueError: an index is not a level.
        """
        channels, levels = self.counts.shape
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < levels:
            raise ValueError(f"index {indices.max()} among indices of {levels} levels")
        cells = indices.reshape(-1, channels).astype(np.int64) + np.arange(channels) * levels
        counts = np.bincount(cells.ravel(), minlength=channels * levels)
        self.counts += counts.reshape(channels, levels)
        self.clipped += clipped.reshape(-1, channels).sum(axis=0, dtype=np.int64)

    def merge(self, other: "ChannelStatistics") -> None:
        """Adds the counts of another process or an earlier run."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"cannot merge {other.counts.shape} into {self.counts.shape}")
        self.counts += other.counts
        self.clipped += other.clipped

    def to_json(self) -> dict[str, Any]:
        """The counts, as lists."""
        return {"counts": self.counts.tolist(), "clipped": self.clipped.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ChannelStatistics":
        """Inverse of `to_json`."""
        statistics = cls(*np.shape(value["counts"]))
        statistics.counts += np.asarray(value["counts"], np.int64)
        statistics.clipped += np.asarray(value["clipped"], np.int64)
        return statistics

    def summary(self) -> dict[str, Any]:
        """A report in plain numbers and lists.

        Returns:
          `latents`, how many were counted; `clipped_share` of all latents; for every channel
          `clipped_share_by_channel`, `bits_by_channel` (the entropy of its index) and
          `levels_used_by_channel`; and `bits_per_channel`, the mean of the bits.
        """
        totals = np.maximum(self.counts.sum(axis=1), 1)
        p = self.counts / totals[:, None]
        bits = -np.sum(p * np.log2(np.where(p > 0, p, 1.0)), axis=1) + 0.0
        return {
            "latents": int(self.counts.sum()),
            "clipped_share": int(self.clipped.sum()) / int(totals.sum()),
            "clipped_share_by_channel": (self.clipped / totals).tolist(),
            "bits_per_channel": float(bits.mean()),
            "bits_by_channel": bits.tolist(),
            "levels_used_by_channel": np.count_nonzero(self.counts, axis=1).tolist(),
        }


def resolve_channel_order(
    setting: str | Sequence[Any], channels: int, spectrum: ChannelSpectrum | None = None
) -> tuple[int, ...]:
    """Turns `config.quantizer.channel_order` into a channel order.

    Args:
      setting: "kl16", "identity", "frequency" (needs `spectrum`), or the order itself: a sequence,
        or a text such as "(2, 0, 1)", as a flag gives it.
      channels: C; a single one has one order, whatever the setting.
      spectrum: measured on the data.

    Raises:
      UserError: the setting is unknown, or is not an order of these channels.
    """
    if channels == 1:
        return (0,)
    if setting == "frequency":
        if spectrum is None:
            raise UserError('channel_order "frequency" is measured on latents: run tokenize first')
        order = spectrum.order()
    elif isinstance(setting, str):
        named = {"kl16": KL16_CHANNEL_ORDER, "identity": tuple(range(channels))}
        order = named.get(setting) or _as_order(setting)
    else:
        order = _as_order(setting)
    if sorted(order) != list(range(channels)):
        raise UserError(
            f"channel order {list(order)} does not list channels 0..{channels - 1} once"
        )
    return order


def _as_order(setting: str | Sequence[Any]) -> tuple[int, ...]:
    try:
        listed = ast.literal_eval(setting) if isinstance(setting, str) else setting
        return tuple(map(operator.index, listed))
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f'channel_order "{setting}" must be "kl16", "frequency", "identity" or a list'
        ) from error
