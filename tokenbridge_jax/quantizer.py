"""Post-training quantizer: maps every latent channel to one of V levels, without training.

The levels are the means of V equally likely bins of a standard normal clipped to +-3 (paper,
section 3.2). A latent x in [minimum, maximum] is moved to that scale,
`(x - minimum) / (maximum - minimum) * 6 - 3`, and clipped. It takes the nearest level value, and
the lowest index on a tie. An index comes back as `(v + 3) / 6 * (maximum - minimum) + minimum`.
Both formulas are evaluated in float32, in that order of operations.

Only numpy evaluates them, once, on the host. The map from x to its index never decreases, so it is
given by V - 1 thresholds: the smallest float32 x of every index, found by bisection over float32
bit patterns. On a device, quantizing is a binary search among the thresholds and dequantizing is a
table lookup. No compiler or accelerator can round these differently, and no `[..., V]` array
exists.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Bool, Float, Integer

from tokenbridge_jax.runtime.errors import UserError

# Levels and boundaries are on the scale of a standard normal, clipped to +- this.
SCALE_LIMIT = 3.0
MAX_LEVELS = 4096

# Two levels closer than this could tie after rounding, for a latent at the far end of the scale.
# The lower index would win the tie, and indices would no longer increase with the latent.
_MIN_GAP = 2e-6
# A bin narrower than this holds no probability. Clipping makes such bins where V > 740.
_MIN_BIN = 1e-4


def gaussian_boundaries(levels: int) -> np.ndarray:
    """Edges of V equally likely bins of a standard normal, clipped to +-3: float32 `[V + 1]`."""
    quantiles = scipy.special.ndtri(np.linspace(0.0, 1.0, levels + 1))
    return np.clip(quantiles, -SCALE_LIMIT, SCALE_LIMIT).astype(np.float32)


def gaussian_levels(levels: int) -> np.ndarray:
    """Mean of the standard normal within every bin, in float32 arithmetic: `[V]` on the +-3 scale.

    For V > 740 the outermost bins are wholly beyond +-3, and their value is +-3. Of several equal
    levels only the lowest index is ever used.
    """
    edges = gaussian_boundaries(levels)
    # Each operation is rounded to float32. exp and erf are computed in float64, because the float32
    # routines of different machines round differently.
    exponential = np.exp(-(edges * edges / np.float32(2)).astype(np.float64)).astype(np.float32)
    density = exponential / np.float32(math.sqrt(2 * math.pi))
    scaled = (edges / np.float32(math.sqrt(2))).astype(np.float64)
    erf = scipy.special.erf(scaled).astype(np.float32)
    cumulative = (np.float32(1) + erf) * np.float32(0.5)

    low, high = edges[:-1], edges[1:]
    empty = high - low < _MIN_BIN
    mass = np.where(empty, np.float32(1), np.diff(cumulative))
    outermost = np.where(low < 0, np.float32(-SCALE_LIMIT), np.float32(SCALE_LIMIT))
    # The mass of a bin that clipping made thin is small: rounding could put the mean outside of it.
    return np.where(empty, outermost, np.clip(-np.diff(density) / mass, low, high))


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Latents <-> indices, the same for all channels. Immutable, hashable, usable inside jit.

    Attributes:
      level_values: the V level values on the +-3 scale, exact float32 numbers, never decreasing. An
        imported model has values of its own.
      minimum: the latent that maps to -3; lower ones are clipped.
      maximum: the latent that maps to +3; higher ones are clipped.
      has_order: whether neighbouring indices stand for neighbouring latents.

    Raises:
      UserError: on construction, if one of them is not valid.
    """

    level_values: tuple[float, ...]
    minimum: float = -5.0
    maximum: float = 5.0

    latents_per_index: ClassVar[int] = 1
    has_order: ClassVar[bool] = True

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
        return dataclasses.asdict(self) | {"level_values": list(self.level_values)}

    @property
    def levels(self) -> int:
        """V."""
        return len(self.level_values)

    @property
    def description(self) -> str:
        """A few words for people."""
        return f"{self.levels} levels, latents in [{self.minimum:g}, {self.maximum:g}]"

    @property
    def index_dtype(self) -> np.dtype:
        """uint8 up to 256 levels, uint16 above."""
        return _index_dtype(self.levels)

    @property
    def blank(self) -> int:
        """The index that stands for the latent nearest to 0."""
        return int(np.argmin(np.abs(self.dequantized_levels)))

    def boundaries(self) -> np.ndarray:
        """Bin edges of the paper's quantizer of V levels: float32 `[V + 1]`, +-3 scale."""
        return gaussian_boundaries(self.levels)

    @functools.cached_property
    def dequantized_levels(self) -> np.ndarray:
        """The latent every index stands for: float32 `[V]`."""
        values = np.asarray(self.level_values, np.float32)
        low, extent = np.float32(self.minimum), self._extent
        return (values + np.float32(3)) / np.float32(6) * extent + low

    @functools.cached_property
    def thresholds(self) -> np.ndarray:
        """Smallest float32 latent whose index is k or more, for k = 1, 2, ...: float32 `[V - 1]`.

        It is shorter where the last levels are equal: no latent reaches those indices.
        """
        distinct, first = np.unique(np.asarray(self.level_values, np.float32), return_index=True)

        def takes_upper(x: np.ndarray) -> np.ndarray:
            """Whether x lies strictly nearer to the upper of each pair of neighbouring levels."""
            scaled = self._to_scale(x)
            return np.abs(scaled - distinct[1:]) < np.abs(scaled - distinct[:-1])

        # Bisection over all float32 at once: `no` never takes the upper level, `yes` always does.
        infinity = np.float32(np.inf).view(np.int32).astype(np.int64)
        no, yes = (np.full(distinct.size - 1, end) for end in (-infinity, infinity))
        while (yes - no > 1).any():
            middle = (no + yes) // 2
            upper = takes_upper(_from_ordered_bits(middle))
            no, yes = np.where(upper, no, middle), np.where(upper, middle, yes)
        # Of equal levels the first is used, so the next distinct level passes several indices.
        return np.repeat(_from_ordered_bits(yes), np.diff(first))

    def quantize(self, latents: Float[Array | np.ndarray, "..."]) -> Integer[Array, "..."]:
        """Latents (scaled, float32) -> indices of `index_dtype`; +-inf clips.

        Raises:
          UserError: a latent is NaN. This is only checked outside jit. Inside jit, NaN takes the
            last index that any latent has.
        """
        latents = _without_nan(latents)
        # Unrolled, the search is one fused operation: 6 lookups for 64 levels.
        indices = jnp.searchsorted(self.thresholds, latents, side="right", method="scan_unrolled")
        return indices.astype(self.index_dtype)

    def dequantize(self, indices: Integer[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """Indices -> float32 latents; NaN for an index of V or above."""
        return jnp.take(jnp.asarray(self.dequantized_levels), indices, axis=0, mode="fill")

    def clipped(self, latents: Float[Array | np.ndarray, "..."]) -> Bool[Array | np.ndarray, "..."]:
        """Which latents lie outside [minimum, maximum]."""
        return (latents < self.minimum) | (latents > self.maximum)

    @property
    def _extent(self) -> np.float32:
        return np.float32(self.maximum - self.minimum)  # Rounded once, as PyTorch does.

    def _to_scale(self, x: np.ndarray) -> np.ndarray:
        """Latents -> clipped +-3 scale, in numpy's float32: the definition of the quantizer."""
        with np.errstate(over="ignore"):
            scaled = (x - np.float32(self.minimum)) / self._extent * np.float32(6) - np.float32(3)
        return np.clip(scaled, np.float32(-3), np.float32(3))


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """The V codes of a trained codebook: a position has one index, which stands for a vector.

    Attributes:
      codes: float32, of length 1.
    """

    codes: Float[np.ndarray, "V D"]

    minimum = -1.0
    maximum = 1.0
    blank = 0
    has_order = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codebook) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @functools.cached_property
    def _key(self) -> tuple[tuple[int, ...], bytes]:
        return self.codes.shape, hashlib.sha256(self.codes.tobytes()).digest()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Codebook":
        """Inverse of `to_json`, exact to the bit."""
        return cls(np.asarray(value["codes"], np.float32))

    def to_json(self) -> dict[str, Any]:
        """Plain dict; float32 numbers survive JSON exactly."""
        return {"codes": self.codes.tolist()}

    @property
    def levels(self) -> int:
        """V."""
        return len(self.codes)

    @property
    def description(self) -> str:
        """See `Quantizer.description`."""
        return f"{self.levels} codes of length 1, of {self.latents_per_index} numbers each"

    @property
    def latents_per_index(self) -> int:
        """D."""
        return self.codes.shape[1]

    @property
    def index_dtype(self) -> np.dtype:
        """uint8 up to 256 codes, uint16 above."""
        return _index_dtype(self.levels)

    @property
    def dequantized_levels(self) -> np.ndarray:
        """The codes: float32 `[V, D]`."""
        return self.codes

    def quantize(self, latents: Float[Array | np.ndarray, "... D"]) -> Integer[Array, "... 1"]:
        """The number of the nearest code, which has the largest product: all have length 1.

        Raises:
          UserError: a latent is NaN. This is only checked outside jit.
        """
        products = jnp.matmul(_without_nan(latents), self.codes.T, precision="highest")
        return jnp.argmax(products, axis=-1, keepdims=True).astype(self.index_dtype)

    def dequantize(self, indices: Integer[Array | np.ndarray, "... 1"]) -> Float[Array, "... D"]:
        """The codes of indices, float32; NaN for an index of V or above."""
        return jnp.take(jnp.asarray(self.codes), indices[..., 0], axis=0, mode="fill")

    def clipped(
        self, latents: Float[Array | np.ndarray, "... D"]
    ) -> Bool[Array | np.ndarray, "... 1"]:
        """No latent is outside of a range."""
        return jnp.zeros((*latents.shape[:-1], 1), bool)


@dataclasses.dataclass(frozen=True)
class Unquantized:
    """Stands for a quantizer where a model's values are the latents themselves."""

    levels = 0
    blank = 0.0
    latents_per_index = 1
    description = "none: the head draws latents"

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Unquantized":
        """Inverse of `to_json`."""
        del value
        return cls()

    def to_json(self) -> dict[str, Any]:
        """Marks the class; `quantizer_from_json` knows it by this."""
        return {"levels": 0}

    @property
    def index_dtype(self) -> np.dtype:
        """Of a model's values: float32."""
        return np.dtype(np.float32)

    def quantize(self, latents: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """The latents."""
        return jnp.asarray(latents, jnp.float32)

    def dequantize(self, values: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
        """The values."""
        return jnp.asarray(values)

    def clipped(self, latents: Float[Array | np.ndarray, "..."]) -> Bool[Array | np.ndarray, "..."]:
        """No latent is outside of a range."""
        return jnp.zeros(latents.shape, bool)


AnyQuantizer = Quantizer | Codebook | Unquantized


def quantizer_from_json(value: Mapping[str, Any]) -> AnyQuantizer:
    """The quantizer that a `to_json` described."""
    if "codes" in value:
        return Codebook.from_json(value)
    kind = Unquantized if value.get("levels") == 0 else Quantizer
    return kind.from_json(value)


def _without_nan(latents: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """The latents in float32, checked outside jit."""
    latents = jnp.asarray(latents, jnp.float32)
    if not isinstance(latents, jax.core.Tracer) and jnp.isnan(latents).any():
        raise UserError("latents hold NaN: the autoencoder's weights or input are damaged")
    return latents


def _index_dtype(levels: int) -> np.dtype:
    return np.dtype(np.uint8 if levels <= 256 else np.uint16)


def _from_ordered_bits(ordered: np.ndarray) -> np.ndarray:
    """Integers -> float32 in the same order, neighbours to neighbours; 0 stands for both zeros."""
    bits = np.where(ordered >= 0, ordered, -(2**31) - ordered)
    return bits.astype(np.int32).view(np.float32)
