"""Products of float32 arrays that mean the same on every platform.

By default, XLA multiplies float32 arrays exactly on CPUs, but rounds them to 11 bits
(TensorFloat-32) on NVIDIA GPUs and to 8 bits (bfloat16) on TPUs. So every product of this package
names the precision it needs:

float32        as exact as float32 is: six passes of bfloat16 products on TPUs, and on GPUs three of
               TensorFloat-32 for convolutions
tensorfloat32  operands of 11 bits or more: one pass on GPUs, three on TPUs, float32 on CPUs
bfloat16       all arrays are bfloat16; sums of products are float32
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenbridge_jax.runtime.errors import UserError

PRECISIONS = ("float32", "tensorfloat32", "bfloat16")

# Tensor cores round their running sum towards zero at every step. Over so many input channels
# (times the kernel's places) this loses no more than float32 does; see docs/performance.md.
SUMMED_CHANNELS = 64


def check_precision(precision: str, name: str) -> None:
    """Raises `UserError` unless `precision`, the value of the setting `name`, is known."""
    if precision not in PRECISIONS:
        raise UserError(f"{name} is '{precision}', must be one of {', '.join(PRECISIONS)}")


def compute_dtype(precision: str) -> Any:
    """The dtype of arrays at a precision."""
    return jnp.bfloat16 if precision == "bfloat16" else jnp.float32


def of_products(dtype: Any) -> str | None:
    """The `precision` argument of JAX's products for arrays of `dtype`; float32 means float32."""
    return "highest" if dtype == jnp.float32 else None


def convolution(
    x: Float[Array, "B H W D"],
    kernel: Float[Array | np.ndarray, "k l D E"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    precision: str,
) -> Float[Array, "B h w E"]:
    """A convolution at one of `PRECISIONS`; the result has that precision's dtype."""
    dtype = compute_dtype(precision)
    x, kernel = x.astype(dtype), jnp.asarray(kernel, dtype)
    if precision == "float32":
        return _exact(x, kernel, tuple(strides), padding)
    return _convolve(x, kernel, strides, padding, "high" if dtype == jnp.float32 else None)


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, precision: str | None
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _exact(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    """A float32 convolution; on NVIDIA GPUs 2.4 times as fast as on their float32 units."""
    settings = dict(strides=strides, padding=padding)
    anywhere = functools.partial(_convolve, **settings, precision="highest")
    on_gpu = functools.partial(three_passes, **settings)
    return jax.lax.platform_dependent(x, kernel, cuda=on_gpu, default=anywhere)


@_exact.defjvp
def _exact_jvp(strides: Any, padding: Any, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    tangent = _convolve(dx, kernel, strides, padding, "highest")
    tangent += _convolve(x, dkernel, strides, padding, "highest")
    return _exact(x, kernel, strides, padding), tangent


def three_passes(
    x: Float[Array, "B H W D"], kernel: Float[Array, "k l D E"], strides: Any, padding: Any
) -> Float[Array, "B h w E"]:
    """A float32 convolution from TensorFloat-32 products.

    Each operand is split into two of 11 bits: x w = xh wh + xh wl + xl wh, up to a relative 2^-22.
    The three products are one convolution over three times the channels, so that its sums stay in
    registers.
    """
    total: Any = 0
    for start in range(0, x.shape[-1], SUMMED_CHANNELS):
        some = slice(start, start + SUMMED_CHANNELS)
        x_high, x_low = _halves(x[..., some])
        kernel_high, kernel_low = _halves(kernel[:, :, some])
        x_parts = jnp.concatenate([x_high, x_low, x_high], axis=-1)
        kernel_parts = jnp.concatenate([kernel_low, kernel_high, kernel_high], axis=2)
        total += _convolve(x_parts, kernel_parts, strides, padding, "high")
    return total


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x rounded to TensorFloat-32's 11 bits, and the remainder."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    return high, x - high
