"""Products of linear layers with 8-bit floats, forward and backward.

Every array has one scale, a power of two found from its largest number each time. Scaling is then
exact, and only the smallest numbers of an array, below 2^-15 of the largest (2^-29 for gradients),
are rounded in a way that depends on the others. Activations and weights have 4 bits of precision
(E4M3), gradients 3 (E5M2); see Micikevicius et al., arXiv 2209.05433. Sums of products are float32.

NVIDIA GPUs from Hopper on have units for such products. For other devices XLA makes the operands
wider first: the results are the same to rounding, but no sooner than without this option.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenbridge_jax.ops.precision import of_products

OPERANDS, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2


class Scaled(NamedTuple):
    """An array `values * scale`: 8-bit values, and a power of two in the dtype of the array."""

    values: Float[Array, "..."]
    scale: Float[Array, ""]


def scaled(x: Float[Array, "..."], dtype: Any) -> Scaled:
    """Rounds an array to an 8-bit dtype. Its largest number uses the largest exponent but one."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    _, exponent = jnp.frexp(largest)
    # Within what the scale and its inverse can be.
    shift = jnp.clip(jnp.finfo(dtype).maxexp - 1 - exponent, -126, 126)
    one = jnp.float32(1)
    values = x * jnp.ldexp(one, shift).astype(x.dtype)
    return Scaled(values.astype(dtype), jnp.ldexp(one, -shift).astype(x.dtype))


def _product(a: Scaled, b: Scaled, a_axes: range, b_axes: range) -> jax.Array:
    """Contracts some axes; the result has the dtype of the scales."""
    dtype = a.scale.dtype
    product = jax.lax.dot_general(
        a.values,
        b.values,
        ((tuple(a_axes), tuple(b_axes)), ((), ())),
        precision=of_products(dtype),
        preferred_element_type=dtype,
    )
    # One after the other: the product of the scales may be too large or too small a number.
    return product * a.scale * b.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float8_product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int
) -> Float[Array, "..."]:
    """`jnp.tensordot(x, kernel, axes)` of 8-bit operands; also the gradients are such products.

    Args:
      x: `[*N, *K]`.
      kernel: `[*K, *M]`, of the dtype of `x`, which is that of the result `[*N, *M]`.
      axes: the number of axes K.
    """
    return _forward(x, kernel, axes)[0]


def _forward(x: jax.Array, kernel: jax.Array, axes: int) -> tuple[jax.Array, Any]:
    x8, kernel8 = scaled(x, OPERANDS), scaled(kernel, OPERANDS)
    return _product(x8, kernel8, range(x.ndim - axes, x.ndim), range(axes)), (x8, kernel8)


def _backward(axes: int, residuals: tuple[Scaled, Scaled], d_y: jax.Array) -> tuple[Any, Any]:
    x, kernel = residuals
    rows = range(x.values.ndim - axes)
    d_y8 = scaled(d_y, GRADIENTS)
    outputs = range(len(rows), d_y.ndim)
    d_x = _product(d_y8, kernel, outputs, range(axes, kernel.values.ndim))
    return d_x, _product(x, d_y8, rows, rows)


float8_product.defvjp(_forward, _backward)
