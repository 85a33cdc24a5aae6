"""Bias, exact GELU and dropout of the MLP's units.

On GPUs, XLA's fusions of these are limited by arithmetic, not by memory. The kernels compute less:
one exponential gives both the normal distribution function and its density, one hash decides for
two units, and the backward kernel also sums the bias' gradient. Other platforms run the plain
version, which is the definition. What is dropped does not depend on the platform.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from tokenbridge_jax.ops.dropout import PAIR_STRIDE, keep_pair, keep_units, pair_rate
from tokenbridge_jax.ops.pallas import LOG2_E, by_platform, gpu_call, on_shards, pl, pl_triton
from tokenbridge_jax.runtime.meshes import batch_shards_in_use

# The rows that a program holds at a time, and those that one program of the backward pass reads.
TILE = 4
ROWS = 64
WARPS = 8

# With fewer rows, launching costs more than the arithmetic saves: XLA records its own kernels in
# CUDA graphs, which a Pallas kernel interrupts.
FEWEST_ROWS = 4096

# (1 - Phi(x)) / exp(-x^2 / 2), which falls from 1/2 to 0, is approximated by a polynomial of
# t = 1 / (1 + 0.3 x) without constant term (Chebyshev fit; relative error 2e-7 up to x = 13).
_SLOPE = 0.3
_COEFFICIENTS = (
    0.1196293, 0.12075396, 0.09991349, 0.12856165, -0.05368367, 0.20635353, -0.15720311, 0.03567478,
)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gelu_dropout(
    x: Float[Array, "... F"], bias: Float[Array, " F"], seed: UInt32[Array, "2"], rate: float
) -> Float[Array, "... F"]:
    """dropout(GELU(x + bias)) with the exact GELU, y Phi(y), computed in float32.

    The backward pass keeps only the arguments.

    Args:
      x: the product of a linear layer, without its bias. Adding it here costs no pass over memory.
      bias: the layer's bias, in the dtype of `x`.
      seed: of the dropout; see `dropout.seed_words`.
      rate: the probability that a unit is dropped, rounded to a multiple of 2^-16 by
        `dropout.pair_rate`. Kept units are divided by 1 minus the rounded rate.
    """
    return _forward(x, bias, seed, rate)[0]


def _forward(x: jax.Array, bias: jax.Array, seed: jax.Array, rate: float) -> tuple[jax.Array, Any]:
    plain = functools.partial(plain_gelu_dropout, rate=rate)
    kernel = functools.partial(kernel_forward, rate=rate)
    return by_platform(plain, kernel, _has_kernel(x), x, bias, seed), (x, bias, seed)


def _backward(rate: float, residuals: Any, d_y: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    plain = functools.partial(plain_gradients, rate=rate)
    kernel = functools.partial(kernel_backward, rate=rate)
    return *by_platform(plain, kernel, _has_kernel(d_y), *residuals, d_y), None


gelu_dropout.defvjp(_forward, _backward)


def _has_kernel(x: jax.Array) -> bool:
    """Whether every device has enough rows, and both units of every pair."""
    parts = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    pairs = x.shape[-1] % (2 * PAIR_STRIDE * parts) == 0
    rows = math.prod(x.shape[:-1]) // batch_shards_in_use()
    return x.dtype == jnp.bfloat16 and pairs and rows >= FEWEST_ROWS


def plain_gelu_dropout(x: jax.Array, bias: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """`gelu_dropout` in plain operations."""
    wide = (x + jnp.broadcast_to(bias, x.shape)).astype(jnp.float32)
    return _drop(wide * _normal_cdf(wide), seed, rate).astype(x.dtype)


def plain_gradients(
    x: jax.Array, bias: jax.Array, seed: jax.Array, d_y: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `gelu_dropout` with respect to `x` and `bias`, in plain operations."""
    wide = (x + jnp.broadcast_to(bias, x.shape)).astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * np.float32((2 * math.pi) ** -0.5)
    slope = _normal_cdf(wide) + wide * density
    d_x = _drop(slope * d_y.astype(jnp.float32), seed, rate).astype(x.dtype)
    d_bias = jnp.sum(d_x, axis=range(x.ndim - 1), dtype=jnp.float32)
    return d_x, d_bias.astype(bias.dtype)


def _normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


def _drop(x: Float[Array, "... F"], seed: UInt32[Array, "2"], rate: float) -> jax.Array:
    return jnp.where(keep_units(seed, x.shape, rate), x * _kept_scale(rate), 0) if rate else x


def _kept_scale(rate: float) -> np.float32:
    return np.float32(1 / (1 - pair_rate(rate)))


def kernel_forward(
    x: jax.Array, bias: jax.Array, seed: jax.Array, *, rate: float, interpret: bool = False
) -> jax.Array:
    """`gelu_dropout` on a GPU."""
    kernel = functools.partial(_forward_kernel, total=x.shape[-1], rate=rate, interpret=interpret)

    def call(seed: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        return gpu_call(
            kernel,
            grid=(pl.cdiv(x.shape[0], TILE), x.shape[1] // (2 * PAIR_STRIDE)),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            warps=WARPS,
            interpret=interpret,
        )(seed, bias, x)

    rows = x.reshape(-1, x.shape[-1])
    y = on_shards(call, (_BIAS, _UNITS), _UNITS, seed, bias, rows, numbered=_UNITS)
    return y.reshape(x.shape)


def kernel_backward(
    x: jax.Array,
    bias: jax.Array,
    seed: jax.Array,
    d_y: jax.Array,
    *,
    rate: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `gelu_dropout` with respect to `x` and `bias`, on a GPU."""
    kernel = functools.partial(_backward_kernel, total=x.shape[-1], rate=rate, interpret=interpret)

    def call(seed: jax.Array, bias: jax.Array, x: jax.Array, d_y: jax.Array) -> Any:
        blocks = pl.cdiv(x.shape[0], ROWS)
        return gpu_call(
            kernel,
            grid=(blocks, x.shape[1] // (2 * PAIR_STRIDE)),
            out_shape=(
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                jax.ShapeDtypeStruct((blocks, x.shape[1]), jnp.float32),
            ),
            warps=WARPS,
            interpret=interpret,
        )(seed, bias, x, d_y)

    rows = (array.reshape(-1, x.shape[-1]) for array in (x, d_y))
    inputs, outputs = (_BIAS, _UNITS, _UNITS), (_UNITS, _UNITS)
    d_x, d_bias = on_shards(call, inputs, outputs, seed, bias, *rows, numbered=_UNITS)
    return d_x.reshape(x.shape), jnp.sum(d_bias, axis=0).astype(bias.dtype)


_BIAS = ("mlp",)
_UNITS = ("batch", "mlp")


class _Tile:
    """`[TILE, PAIR_STRIDE]` units from a row and a column on (half 0), and their partners (half 1).

    Rows beyond the last are read as 0 and not written.
    """

    def __init__(
        self, seed_ref: Any, x_ref: Any, row: jax.Array, column: jax.Array, total: int, rate: float
    ):
        shape = (TILE, PAIR_STRIDE)
        self._rows, self._column, self._rate = pl.ds(row, TILE), column, rate
        inside = row + jnp.arange(TILE) < x_ref.shape[0]
        self._inside = jnp.broadcast_to(inside[:, None], shape)
        if rate:
            rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            rows += row + seed_ref[2].astype(jnp.int32)
            columns += column + seed_ref[3].astype(jnp.int32)
            counter = (rows * total + columns).astype(jnp.uint32)
            self._kept = keep_pair(seed_ref[0], seed_ref[1], counter, rate)

    def _place(self, half: int) -> tuple[Any, Any]:
        return self._rows, _columns(self._column, half)

    def load(self, ref: Any, half: int) -> jax.Array:
        return pl_triton.load(ref.at[self._place(half)], mask=self._inside, other=0.0)

    def store(self, ref: Any, x: jax.Array, half: int) -> None:
        pl_triton.store(ref.at[self._place(half)], x.astype(ref.dtype), mask=self._inside)

    def drop(self, x: jax.Array, half: int) -> jax.Array:
        if not self._rate:
            return x
        return jnp.where(self._kept[half], x * _kept_scale(self._rate), 0.0)


def _columns(first: jax.Array, half: int) -> Any:
    return pl.ds(first + half * PAIR_STRIDE, PAIR_STRIDE)


def _tail(x: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The probability of a standard normal beyond |x|, and exp(-x^2 / 2)."""
    bell = jnp.exp2(x * x * np.float32(-0.5 * LOG2_E))
    return bell * (_ratio(x) if interpret else _ratio_in_ptx(x)), bell


def _ratio(x: jax.Array) -> jax.Array:
    """The polynomial above, at |x|."""
    t, y = 1 / (1 + _SLOPE * jnp.abs(x)), jnp.zeros_like(x)
    for coefficient in reversed(_COEFFICIENTS):
        y = (y + coefficient) * t
    return y


def _ratio_in_ptx(x: jax.Array) -> jax.Array:
    """`_ratio` with `fma` instructions, which no compiler on the way to the GPU makes."""
    last, *others = (_literal(coefficient) for coefficient in reversed(_COEFFICIENTS))
    code = f"""{{
        .reg .f32 t, y;
        abs.f32 t, $1;
        fma.rn.f32 t, t, {_literal(_SLOPE)}, {_literal(1.0)};
        rcp.approx.ftz.f32 t, t;
        mov.f32 y, {last};
        {"".join(f"fma.rn.f32 y, y, t, {other};" for other in others)}
        mul.rn.f32 $0, y, t;
    }}"""
    (y,) = pl_triton.elementwise_inline_asm(
        code,
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y


def _literal(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"


def _forward_kernel(
    seed_ref: Any, bias_ref: Any, x_ref: Any, y_ref: Any, *, interpret: bool, **settings: Any
) -> None:
    row, column = pl.program_id(0) * TILE, pl.program_id(1) * 2 * PAIR_STRIDE
    tile = _Tile(seed_ref, x_ref, row, column, **settings)
    for half in (0, 1):
        wide = (tile.load(x_ref, half) + bias_ref[_columns(column, half)][None]).astype(jnp.float32)
        # x Phi(x), for either sign.
        y = jnp.maximum(wide, 0) - jnp.abs(wide) * _tail(wide, interpret)[0]
        tile.store(y_ref, tile.drop(y, half), half)


def _backward_kernel(
    seed_ref: Any,
    bias_ref: Any,
    x_ref: Any,
    d_y_ref: Any,
    d_x_ref: Any,
    d_bias_ref: Any,
    *,
    interpret: bool,
    **settings: Any,
) -> None:
    """The gradient of ROWS rows, one tile at a time, and its sum over the rows."""
    block, column = pl.program_id(0), pl.program_id(1) * 2 * PAIR_STRIDE
    biases = [bias_ref[_columns(column, half)][None] for half in (0, 1)]

    def add(step: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tile = _Tile(seed_ref, x_ref, block * ROWS + step * TILE, column, **settings)
        sums = []
        for half in (0, 1):
            wide = (tile.load(x_ref, half) + biases[half]).astype(jnp.float32)
            tail, bell = _tail(wide, interpret)
            density = bell * np.float32((2 * math.pi) ** -0.5)
            slope = jnp.where(wide < 0, tail, 1 - tail) + wide * density
            d_x = tile.drop(slope * tile.load(d_y_ref, half).astype(jnp.float32), half)
            tile.store(d_x_ref, d_x, half)
            sums.append(totals[half] + d_x)
        return tuple(sums)

    zeros = jnp.zeros((TILE, PAIR_STRIDE), jnp.float32)
    totals = jax.lax.fori_loop(0, ROWS // TILE, add, (zeros, zeros))
    for half in (0, 1):
        d_bias_ref[block, _columns(column, half)] = jnp.sum(totals[half], axis=0)
