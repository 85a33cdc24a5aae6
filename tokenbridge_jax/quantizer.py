"""Post-training quantizer: every latent channel to one of V levels, without training anything.

Levels are the means of V equally likely bins of a standard normal clipped to +-3 (paper, section
3.2). A latent x in [minimum, maximum] is mapped to that scale,
`(x - minimum) / (maximum - minimum) * 6 - 3`, clipped, and takes the nearest level value, the
lowest index on a tie; an index comes back as `(v + 3) / 6 * (maximum - minimum) + minimum`. Both
in float32, in that order of operations.

Only numpy does that arithmetic, once, on the host. The map from x to its index never decreases,
so it is V - 1 thresholds: the smallest float32 x of every index, found by bisection over float32
bit patterns. On a device quantizing is then a search among the thresholds and dequantizing a table
lookup: no compiler or accelerator can round them differently, and no `[..., V]` array exists. The
search starts from a polynomial's guess, which leaves one comparison for the paper's levels.
"""

import ast
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer
from scipy import special

from tokenbridge_jax.runtime.errors import UserError

# Levels and boundaries live on this scale: standard normal, clipped.
SCALE_LIMIT = 3.0
MAX_LEVELS = 4096

# Two different levels closer than this could tie after rounding, as seen from the far end of the
# scale, and a tie with a lower index would break the order that thresholds rest on.
_MIN_GAP = 2e-6
# Bins narrower than this (only V > 740 has any, cut off by the clipping) hold no probability.
_MIN_BIN = 1e-4

# The polynomial that guesses how many thresholds a latent has passed has odd powers only, since the
# paper's levels are symmetric. Of 64 levels x, x^3 and x^5 are 0.21 off at most; below 0.4 one
# comparison is left. Other levels take the powers, up to so many, that leave the fewest.
_FEWEST_POWERS, _MOST_POWERS = 3, 8
# By how much float32 arithmetic may move a guess, besides the roundings of terms that cancel.
_GUESS_MARGIN = 0.1

# Published order of KL-16's channels: falling share of low-frequency energy.
KL16_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)

# Frequencies up to this share of Nyquist's count as low: 2 of 8 cycles an image on a 16x16 grid.
LOW_FREQUENCY = 0.25


def gaussian_boundaries(levels: int) -> np.ndarray:
    """Edges of V equally likely bins of a standard normal, clipped to +-3: float32 `[V + 1]`."""
    quantiles = special.ndtri(np.linspace(0.0, 1.0, levels + 1))
    return np.clip(quantiles, -SCALE_LIMIT, SCALE_LIMIT).astype(np.float32)


def gaussian_levels(levels: int) -> np.ndarray:
    """Mean of the standard normal within every bin, in float32 arithmetic: `[V]` on the +-3 scale.

    For V > 740 the outermost bins lie wholly beyond +-3. They take +-3 as their value; of equal
    levels the lowest index is the one ever used.
    """
    edges = gaussian_boundaries(levels)
    # Each operation is rounded to float32. exp and erf go through float64, so that they are rounded
    # correctly on every machine rather than by whichever float32 routine it has.
    exponential = np.exp(-(edges * edges / np.float32(2)).astype(np.float64)).astype(np.float32)
    density = exponential / np.float32(math.sqrt(2 * math.pi))
    erf = special.erf((edges / np.float32(math.sqrt(2))).astype(np.float64)).astype(np.float32)
    cumulative = (np.float32(1) + erf) * np.float32(0.5)

    low, high = edges[:-1], edges[1:]
    empty = high - low < _MIN_BIN
    mass = np.where(empty, np.float32(1), np.diff(cumulative))
    outermost = np.where(low < 0, np.float32(-SCALE_LIMIT), np.float32(SCALE_LIMIT))
    # Where clipping cuts a bin thin, its mass is so small that rounding could carry the mean out.
    return np.where(empty, outermost, np.clip(-np.diff(density) / mass, low, high))


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Latents <-> indices, the same for all channels. Immutable, hashable, usable inside jit.

    Attributes:
      level_values: the V level values on the +-3 scale, exact float32 numbers, never decreasing. An
        imported model brings its own.
      minimum: latent that maps to -3; anything below is clipped.
      maximum: latent that maps to +3; anything above is clipped.

    Raises:
      UserError: on construction, if any of them makes no sense.
    """

    level_values: tuple[float, ...]
    minimum: float = -5.0
    maximum: float = 5.0

    def __post_init__(self):
        values = np.asarray(self.level_values, np.float32)
        object.__setattr__(self, "level_values", tuple(values.tolist()))
        if not 2 <= values.size <= MAX_LEVELS:
            raise UserError(f"quantizer has {values.size} levels, must be 2 to {MAX_LEVELS}")
        if not (np.abs(values) <= SCALE_LIMIT).all():
            raise UserError("quantizer level values must lie within -3 and 3")
        gaps = np.diff(values.astype(np.float64))
        if ((gaps != 0) & (gaps < _MIN_GAP)).any():
            raise UserError(
                "quantizer level values must not decrease, and different ones must be at least "
                f"{_MIN_GAP} apart"
            )
        if values[0] == values[-1]:
            raise UserError("quantizer level values are all the same")
        if not 1e-30 <= self.maximum - self.minimum <= 1e38:
            raise UserError(
                f"quantizer range {self.minimum} to {self.maximum} must be finite and increasing, "
                "and 1e-30 to 1e38 wide"
            )

    @classmethod
    def gaussian(cls, levels: int = 64, range: float = 5.0) -> "Quantizer":
        """The paper's quantizer of V = `levels` for latents in [-range, range]."""
        if not 2 <= levels <= MAX_LEVELS:
            raise UserError(f"quantizer levels is {levels}, must be 2 to {MAX_LEVELS}")
        return cls(tuple(gaussian_levels(levels).tolist()), -float(range), float(range))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Quantizer":
        """Inverse of `to_json`, exact to the bit."""
        return cls(tuple(value["level_values"]), value["minimum"], value["maximum"])

    def to_json(self) -> dict[str, Any]:
        """Plain dict; float32 numbers survive JSON exactly."""
        return {
            "level_values": list(self.level_values),
            "minimum": self.minimum,
            "maximum": self.maximum,
        }

    @property
    def levels(self) -> int:
        """V."""
        return len(self.level_values)

    @property
    def index_dtype(self) -> np.dtype:
        """uint8 up to 256 levels, uint16 above."""
        return np.dtype(np.uint8 if self.levels <= 256 else np.uint16)

    def boundaries(self) -> np.ndarray:
        """Bin edges of the paper's quantizer of as many levels: float32 `[V + 1]`, +-3 scale."""
        return gaussian_boundaries(self.levels)

    @functools.cached_property
    def dequantized_levels(self) -> np.ndarray:
        """The latent every index stands for: float32 `[V]`."""
        values = np.asarray(self.level_values, np.float32)
        low, extent = np.float32(self.minimum), self._extent
        return (values + np.float32(3)) / np.float32(6) * extent + low

    @functools.cached_property
    def thresholds(self) -> np.ndarray:
        """Smallest float32 latent whose index is k or more, k = 1 .. V-1; NaN where none has it."""
        distinct, first = np.unique(np.asarray(self.level_values, np.float32), return_index=True)

        def takes_upper(x: np.ndarray) -> np.ndarray:
            """Whether x lies strictly nearer to the upper of each pair of neighbouring levels."""
            scaled = self._to_scale(x)
            return np.abs(scaled - distinct[1:]) < np.abs(scaled - distinct[:-1])

        # Bisection over all float32 at once: `no` never takes the upper level, `yes` always does.
        no = np.full(distinct.size - 1, _ordered_bits(np.float32(-np.inf)))
        yes = np.full(distinct.size - 1, _ordered_bits(np.float32(np.inf)))
        while (yes - no > 1).any():
            middle = (no + yes) // 2
            upper = takes_upper(_from_ordered_bits(middle))
            no, yes = np.where(upper, no, middle), np.where(upper, middle, yes)
        # Of equal levels the first is used: index k is reached with the next distinct level.
        reached_with = np.searchsorted(first[1:], np.arange(1, self.levels))
        return np.append(_from_ordered_bits(yes), np.float32(np.nan))[reached_with]

    def quantize(self, latents: Float[Array | np.ndarray, "..."]) -> Integer[Array, "..."]:
        """Latents (scaled, float32) -> indices of `index_dtype`; +-inf clips.

        Raises:
          UserError: a latent is NaN. Only outside jit, where values can be seen; inside, NaN takes
            the last index that any latent has.
        """
        latents = jnp.asarray(latents, jnp.float32)
        if not isinstance(latents, jax.core.Tracer) and jnp.isnan(latents).any():
            raise UserError("latents hold NaN: the autoencoder's weights or input are damaged")
        search = self._search
        inside = jnp.where(latents < search.last, latents, search.last)  # NaN too
        inside = jnp.maximum(inside, search.first)
        u = (inside - search.center) * search.scale
        odd = functools.reduce(lambda total, c: total * (u * u) + c, search.coefficients) * u
        # A sum beyond 2^23 has no bits for fractions: the place is rounded, and in the lowest bits.
        # The mask promises that the table has it, which else would be checked every time.
        bits = jax.lax.bitcast_convert_type(odd + search.middle, jnp.uint32)
        place = bits & np.uint32(len(search.thresholds) - 1)
        # Halving: it lies between this place and the last that the guess may stand for.
        for step in reversed([2**i for i in range(search.halvings)]):
            threshold = _look_up(search.thresholds, place + np.uint32(step - 1))
            place = jnp.where(inside < threshold, place, place + np.uint32(step))
        return (place - np.uint32(search.before)).astype(self.index_dtype)

    def dequantize(self, indices: Integer[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """Indices -> float32 latents; NaN for an index of V or above."""
        return jnp.take(jnp.asarray(self.dequantized_levels), indices, axis=0, mode="fill")

    def clipped(self, latents: Float[Array | np.ndarray, "..."]) -> Bool[Array | np.ndarray, "..."]:
        """Which latents lie outside [minimum, maximum]."""
        return (latents < self.minimum) | (latents > self.maximum)

    @property
    def _extent(self) -> np.float32:
        return np.float32(self.maximum - self.minimum)  # rounded once, as PyTorch does with scalars

    @functools.cached_property
    def _search(self) -> "_Search":
        thresholds = self.thresholds[~np.isnan(self.thresholds)]
        counts = range(_FEWEST_POWERS, _MOST_POWERS + 1)
        return min((_make_search(thresholds, count) for count in counts), key=lambda s: s.halvings)

    def _to_scale(self, x: np.ndarray) -> np.ndarray:
        """Latents -> clipped +-3 scale, numpy float32: the definition that everything follows."""
        with np.errstate(over="ignore"):
            scaled = (x - np.float32(self.minimum)) / self._extent * np.float32(6) - np.float32(3)
        return np.clip(scaled, np.float32(-3), np.float32(3))


class _Search(NamedTuple):
    """Where to look for a latent among the thresholds, around a polynomial's guess.

    Attributes:
      first: largest latent that has passed no threshold; smaller ones count as this one.
      last: the last threshold; larger latents count as this one.
      center: with `scale`, what maps latents to the polynomial's [-1, 1].
      scale: see `center`.
      coefficients: of the polynomial's odd powers, the highest first.
      middle: the place in `thresholds` from which the polynomial counts, and 2^23. Their sum is the
        first place where the search looks.
      halvings: steps from there to any place that it may have.
      thresholds: the quantizer's between infinities, for places and steps beyond the ends; as many
        as a power of two.
      before: infinities before the first.
    """

    first: np.float32
    last: np.float32
    center: np.float32
    scale: np.float32
    coefficients: np.ndarray
    middle: np.float32
    halvings: int
    thresholds: np.ndarray
    before: int


def _make_search(thresholds: np.ndarray, count: int) -> _Search:
    """The search that starts from a polynomial of `count` odd powers."""
    # Around the thresholds, wherever they are in the range, and rounded as devices have it.
    first, last = np.nextafter(thresholds[0], np.float32(-np.inf)), thresholds[-1]
    low, high = float(thresholds[0]), float(last)
    center, scale = np.float32((low + high) / 2), np.float32(2 / ((high - low) or 1.0))
    u = (thresholds.astype(np.float64) - center) * scale
    u_first = (np.float64(first) - center) * scale
    passed = np.arange(1, len(u) + 1)
    powers = np.arange(1, 2 * count, 2)
    fit = np.linalg.lstsq(u[:, None] ** powers, passed - passed.mean())[0].astype(np.float32)
    polynomial = np.polynomial.Polynomial(np.zeros(powers[-1] + 1))
    polynomial.coef[powers] = fit

    # Where k thresholds are passed the guess should lie between k and k + 1. It is farthest off
    # at a threshold, seen from either side, or at an extremum.
    turns = polynomial.deriv().roots()
    turns = turns[np.isreal(turns)].real
    turns = turns[(u[0] < turns) & (turns < u[-1])]
    points = np.concatenate([[u_first], u, u, turns])
    k = np.concatenate([[0], passed, passed - 1, np.searchsorted(u, turns, side="right")])
    middle = math.ceil(passed.mean())
    guess = middle + polynomial(points)
    off = max((k - guess).max(), (guess - k - 1).max()) + _GUESS_MARGIN
    off += 2.0**-20 * float(np.abs(fit).sum())

    below, above = math.ceil(off + 0.5), math.ceil(off - 0.5)
    halvings = (below + above).bit_length()
    before, after = 2 * below, 2**halvings + above
    size = 1 << (before + len(thresholds) + after - 1).bit_length()
    pad = before, size - before - len(thresholds)
    return _Search(
        first=first,
        last=last,
        center=center,
        scale=scale,
        coefficients=fit[::-1],
        middle=np.float32(2**23 + middle + below),
        halvings=halvings,
        thresholds=np.pad(thresholds, pad, constant_values=(-np.inf, np.inf)),
        before=before,
    )


def _look_up(table: np.ndarray, places: Array) -> Array:
    """Entries of a small table, whose places are known to exist."""
    return jnp.asarray(table).at[places].get(mode="promise_in_bounds")


def _ordered_bits(x: np.float32) -> np.int64:
    """Float32 -> integers in the same order, neighbours to neighbours (both zeros to 0)."""
    bits = np.int64(x.view(np.int32))
    return np.int64(bits if bits >= 0 else -(bits + 2**31))


def _from_ordered_bits(ordered: np.ndarray) -> np.ndarray:
    """Inverse of `_ordered_bits`."""
    bits = np.where(ordered >= 0, ordered, -(2**31) - ordered)
    return bits.astype(np.int32).view(np.float32)


class ChannelSpectrum:
    """Streaming share of low-frequency energy of every channel (paper, appendix).

    Energy is that of the 2D FFT over positions; frequencies whose radius `hypot(f_y, f_x)` is at
    most `low` times Nyquist's are low. A channel's mean over all the data says nothing about any
    image, so its energy is left out; how an image's own mean departs from it counts as low.
    """

    def __init__(self, channels: int, low: float = LOW_FREQUENCY):
        self._low = low
        self._images = 0
        self._low_energy = np.zeros(channels, np.float64)
        self._energy = np.zeros(channels, np.float64)
        self._mean = np.zeros(channels, np.float64)  # per channel, of the images so far

    def update(self, latents: Float[np.ndarray, "B h w C"]) -> None:
        """Adds a batch; every batch must have the same h and w."""
        batch, height, width, _ = latents.shape
        # Energies are taken about the running mean and corrected as it moves (Chan et al.).
        latents = latents.astype(np.float64)
        mean = latents.mean(axis=(0, 1, 2))
        energy_BhwC = np.abs(np.fft.fft2(latents - mean, axes=(1, 2), norm="ortho")) ** 2
        f_y, f_x = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
        is_low = np.hypot(f_y, f_x) <= self._low * 0.5 + 1e-9

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


def channel_order_by_frequency(latents: Float[np.ndarray, "B h w C"]) -> tuple[int, ...]:
    """Channel order of one array of latents; `ChannelSpectrum` does the same batch by batch."""
    spectrum = ChannelSpectrum(latents.shape[-1])
    spectrum.update(latents)
    return spectrum.order()


class ChannelStatistics:
    """Streaming counts of how every channel uses its levels, and how many latents were clipped."""

    def __init__(self, channels: int, levels: int):
        self.counts = np.zeros((channels, levels), np.int64)
        self.clipped = np.zeros(channels, np.int64)

    def update(
        self,
        indices: Integer[np.ndarray, "... C"],
        clipped: Bool[np.ndarray, "... C"] | Integer[np.ndarray, "... C"],
    ) -> None:
        """Adds indices, and which of their latents were clipped (flags, or counts in any shape).

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
        """Adds what another process or an earlier run counted."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"cannot merge {other.counts.shape} into {self.counts.shape}")
        self.counts += other.counts
        self.clipped += other.clipped

    def to_json(self) -> dict[str, Any]:
        """The counts themselves, to go on from."""
        return {"counts": self.counts.tolist(), "clipped": self.clipped.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ChannelStatistics":
        """Inverse of `to_json`."""
        statistics = cls(*np.shape(value["counts"]))
        statistics.counts += np.asarray(value["counts"], np.int64)
        statistics.clipped += np.asarray(value["clipped"], np.int64)
        return statistics

    def summary(self) -> dict[str, Any]:
        """Report as plain numbers and lists.

        Returns:
          `latents` counted; `clipped_share` over all; and for every channel
          `clipped_share_by_channel`, `bits_by_channel` (entropy of its index) and
          `levels_used_by_channel`; `bits_per_channel` is the mean of the bits.
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
      setting: "kl16", "identity", "frequency" (needs `spectrum`), or the order itself, also as
        text such as "(2, 0, 1)": a flag's value.
      channels: C.
      spectrum: what was measured on the data.

    Raises:
      UserError: the setting is unknown, or not an order of these channels.
    """
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
