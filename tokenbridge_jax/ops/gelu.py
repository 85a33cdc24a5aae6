"""Bias, exact GELU and dropout of the MLP's units.

On GPUs, XLA's fusions of these are limited by arithmetic, not by memory. The kernels compute less:
one exponential gives both the normal distribution function and its density, and the backward kernel
also sums the bias' gradient. Other platforms run the plain version, which is the definition. What
is dropped does not depend on the platform.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from tokenbridge_jax.ops.dropout import drop, keep
from tokenbridge_jax.ops.pallas import LOG2_E, by_platform, gpu_call, on_shards, pl, pl_triton
from tokenbridge_jax.runtime.meshes import batch_shards_in_use

# The rows and columns that a program holds at a time, and the rows that one program of the backward
# pass reads.
TILE = 4
COLUMNS = 512
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
      rate: the probability that a unit is dropped.
    """
    return _forward(x, bias, seed, rate)[0]


def _forward(x: jax.Array, bias: jax.Array, seed: jax.Array, rate: float) -> tuple[jax.Array, Any]:
    plain = functools.partial(plain_gelu_dropout, rate=rate)
    kernels = {"cuda": functools.partial(kernel_forward, rate=rate)} if _has_kernel(x) else {}
    return by_platform(plain, kernels, x, bias, seed), (x, bias, seed)


def _backward(rate: float, residuals: Any, d_y: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    plain = functools.partial(plain_gradients, rate=rate)
    kernels = {"cuda": functools.partial(kernel_backward, rate=rate)} if _has_kernel(d_y) else {}
    return *by_platform(plain, kernels, *residuals, d_y), None


gelu_dropout.defvjp(_forward, _backward)


def _has_kernel(x: jax.Array) -> bool:
    """Whether every device has enough rows, and whole tiles."""
    parts = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    whole = x.shape[-1] % (COLUMNS * parts) == 0
    rows = math.prod(x.shape[:-1]) // batch_shards_in_use()
    return x.dtype == jnp.bfloat16 and whole and rows >= FEWEST_ROWS


def plain_gelu_dropout(x: jax.Array, bias: jax.Array, seed: jax.Array, rate: float) -> jax.Array:
    """`gelu_dropout` in plain operations."""
    wide = (x + jnp.broadcast_to(bias, x.shape)).astype(jnp.float32)
    return drop(wide * _normal_cdf(wide), seed, rate).astype(x.dtype)


def plain_gradients(
    x: jax.Array, bias: jax.Array, seed: jax.Array, d_y: jax.Array, rate: float
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `gelu_dropout` with respect to `x` and `bias`, in plain operations."""
    wide = (x + jnp.broadcast_to(bias, x.shape)).astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * np.float32((2 * math.pi) ** -0.5)
    slope = _normal_cdf(wide) + wide * density
    d_x = drop(slope * d_y.astype(jnp.float32), seed, rate).astype(x.dtype)
    d_bias = jnp.sum(d_x, axis=range(x.ndim - 1), dtype=jnp.float32)
    return d_x, d_bias.astype(bias.dtype)


def _normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


def kernel_forward(
    x: jax.Array, bias: jax.Array, seed: jax.Array, *, rate: float, interpret: bool = False
) -> jax.Array:
    """`gelu_dropout` on a GPU."""
    kernel = functools.partial(_forward_kernel, rate=rate, interpret=interpret)

    def call(seed: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        return gpu_call(
            kernel,
            grid=(pl.cdiv(x.shape[0], TILE), x.shape[1] // COLUMNS),
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
    kernel = functools.partial(_backward_kernel, rate=rate, interpret=interpret)

    def call(seed: jax.Array, bias: jax.Array, x: jax.Array, d_y: jax.Array) -> Any:
        blocks = pl.cdiv(x.shape[0], ROWS)
        return gpu_call(
            kernel,
            grid=(blocks, x.shape[1] // COLUMNS),
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
    """`[TILE, COLUMNS]` units from a row and a column on.

    Rows beyond the last are read as 0 and not written.
    """

    def __init__(self, seed_ref: Any, x_ref: Any, row: jax.Array, columns: Any, rate: float):
        self._place, self._rate = (pl.ds(row, TILE), columns), rate
        rows = row + jnp.arange(TILE)
        inside = rows < x_ref.shape[0]
        self._inside = jnp.broadcast_to(inside[:, None], (TILE, COLUMNS))
        if rate:
            of_column = columns.start + jnp.arange(COLUMNS)
            numbers = (
                rows.astype(jnp.uint32) + seed_ref[2],
                of_column.astype(jnp.uint32) + seed_ref[3],
            )
            self._kept = keep(seed_ref[0], seed_ref[1], numbers[0][:, None], numbers[1][None], rate)

    def load(self, ref: Any) -> jax.Array:
        return pl_triton.load(ref.at[self._place], mask=self._inside, other=0.0)

    def store(self, ref: Any, x: jax.Array) -> None:
        pl_triton.store(ref.at[self._place], x.astype(ref.dtype), mask=self._inside)

    def drop(self, x: jax.Array) -> jax.Array:
        if not self._rate:
            return x
        return jnp.where(self._kept, x * np.float32(1 / (1 - self._rate)), 0.0)


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
    columns = pl.ds(pl.program_id(1) * COLUMNS, COLUMNS)
    tile = _Tile(seed_ref, x_ref, pl.program_id(0) * TILE, columns, **settings)
    wide = (tile.load(x_ref) + bias_ref[columns][None]).astype(jnp.float32)
    # x Phi(x), for either sign.
    y = jnp.maximum(wide, 0) - jnp.abs(wide) * _tail(wide, interpret)[0]
    tile.store(y_ref, tile.drop(y))


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
    block, columns = pl.program_id(0), pl.ds(pl.program_id(1) * COLUMNS, COLUMNS)
    bias = bias_ref[columns][None]

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        tile = _Tile(seed_ref, x_ref, block * ROWS + step * TILE, columns, **settings)
        wide = (tile.load(x_ref) + bias).astype(jnp.float32)
        tail, bell = _tail(wide, interpret)
        density = bell * np.float32((2 * math.pi) ** -0.5)
        slope = jnp.where(wide < 0, tail, 1 - tail) + wide * density
        d_x = tile.drop(slope * tile.load(d_y_ref).astype(jnp.float32))
        tile.store(d_x_ref, d_x)
        return total + d_x

    total = jax.lax.fori_loop(0, ROWS // TILE, add, jnp.zeros((TILE, COLUMNS), jnp.float32))
    d_bias_ref[block, columns] = jnp.sum(total, axis=0)
