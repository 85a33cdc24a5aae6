"""Products of linear layers with 8-bit floats, forward and backward.

Every token has one scale, and every weight matrix: powers of two, found from their largest number
each time, so scaling is exact. Only numbers below 2^-13 of the largest (2^-28 for gradients) are
rounded in a way that depends on the others of their token or matrix. Tokens do not depend on each
other; only the gradient of a matrix needs a scale for all of them. Activations and weights have 4
bits of precision (E4M3), gradients 3 (E5M2); see Micikevicius et al., arXiv 2209.05433. Sums of
products are float32.

NVIDIA GPUs from Hopper on have units for such products. It was not tried on other devices, where
XLA may make the operands wider first.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenbridge_jax.ops.precision import of_products

OPERANDS, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2


class Scaled(NamedTuple):
    """An array `values * scale`: 8-bit values, and powers of two in the dtype of the array.

    `scale` has the axes of `values`, of size 1 where it is the same.
    """

    values: Float[Array, "..."]
    scale: Float[Array, "..."]


def scaled(x: Float[Array, "..."], dtype: Any, axes: Iterable[int] | None = None) -> Scaled:
    """Rounds an array to an 8-bit dtype. The largest numbers use the largest exponent but one.

    Args:
      x: the array.
      dtype: of 8 bits.
      axes: along which the scale is the same; all by default.
    """
    finite = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    axes = None if axes is None else tuple(axes)
    _, exponent = jnp.frexp(jnp.max(finite, axis=axes, keepdims=True).astype(jnp.float32))
    # Within what the scale and its inverse can be.
    shift = jnp.clip(jnp.finfo(dtype).maxexp - 1 - exponent, -126, 126)
    one = jnp.float32(1)
    values = x * jnp.ldexp(one, shift).astype(x.dtype)
    return Scaled(values.astype(dtype), jnp.ldexp(one, -shift).astype(x.dtype))


def _product(
    a: jax.Array, b: jax.Array, a_axes: Iterable[int], b_axes: Iterable[int], dtype: Any
) -> jax.Array:
    """Contracts some axes of 8-bit arrays."""
    return jax.lax.dot_general(
        a,
        b,
        ((tuple(a_axes), tuple(b_axes)), ((), ())),
        precision=of_products(dtype),
        preferred_element_type=dtype,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float8_product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int
) -> Float[Array, "..."]:
    """`jnp.tensordot(x, kernel, axes)` of 8-bit operands; also the gradients are such products.

    Args:
      x: `[*N, *K]`, N tokens.
      kernel: `[*K, *M]`, of the dtype of `x`, which is that of the result `[*N, *M]`.
      axes: the number of axes K.
    """
    return _forward(x, kernel, axes)[0]


def _forward(x: jax.Array, kernel: jax.Array, axes: int) -> tuple[jax.Array, Any]:
    tokens = x.ndim - axes
    contracted = range(tokens, x.ndim)
    x8, kernel8 = scaled(x, OPERANDS, contracted), scaled(kernel, OPERANDS)
    product = _product(x8.values, kernel8.values, contracted, range(axes), x.dtype)
    # One after the other: the product of the scales may be too large or too small a number.
    return product * _of_tokens(x8, tokens, product) * kernel8.scale.reshape(()), (x8, kernel8)


def _backward(axes: int, residuals: tuple[Scaled, Scaled], d_y: jax.Array) -> tuple[Any, Any]:
    x, kernel = residuals
    tokens = x.values.ndim - axes
    outputs = range(tokens, d_y.ndim)
    d_y8 = scaled(d_y, GRADIENTS, outputs)
    kernel_outputs = range(axes, kernel.values.ndim)
    d_x = _product(d_y8.values, kernel.values, outputs, kernel_outputs, d_y.dtype)
    d_x = d_x * _of_tokens(d_y8, tokens, d_x) * kernel.scale.reshape(())
    # This sum is over the tokens, so their scales go into it.
    weighted = scaled(d_y * _of_tokens(x, tokens, d_y), GRADIENTS)
    d_kernel = _product(x.values, weighted.values, range(tokens), range(tokens), d_y.dtype)
    return d_x, d_kernel * weighted.scale.reshape(())


def _of_tokens(array: Scaled, tokens: int, x: jax.Array) -> jax.Array:
    """The scales of tokens, the first `tokens` axes, with as many axes as `x` has."""
    return array.scale.reshape(*array.scale.shape[:tokens], *[1] * (x.ndim - tokens))


float8_product.defvjp(_forward, _backward)
