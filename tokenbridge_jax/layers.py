"""Linear layers, and copies of parameters, whose gradients are summed in float32.

The gradient of a bias, or of an embedding, is a sum over all positions of all images. In bfloat16
it would stop growing once it is 256 times as large as what is still to be added. So a parameter is
copied, or looked up, in float32, and the copies are cast to what the model computes in: backwards,
each is cast before they are added. (Compilers do that on the way: it costs no pass over memory.)
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenbridge_jax.ops.precision import convolution, of_products
from tokenbridge_jax.runtime.meshes import named_axes

xavier = nn.initializers.xavier_uniform()
# No initialisation of the autoencoder is published; `autoencoder.init_params` draws the same.
lecun = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def copies(
    x: Float[Array | np.ndarray, "..."], shape: tuple[int, ...], dtype: Any
) -> Float[Array, "..."]:
    """x broadcast to a shape, in `dtype`; the gradients of the copies are summed in float32."""
    return jnp.broadcast_to(x.astype(jnp.float32), shape).astype(dtype)


def add_bias(x: Float[Array, "..."], bias: Float[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """x + bias in x's dtype, for a bias of x's last axes; see `copies`."""
    return x + copies(bias, x.shape, x.dtype)


class Dense(nn.Module):
    """`x @ kernel + bias` over as many of x's last axes as the kernel has in front of its last one.

    `axes` are the logical axes of the kernel; the last one is the bias' too.
    """

    width: int
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... {self.width}"]:
        inputs = x.shape[x.ndim + 1 - len(self.axes) :]

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return xavier(key, (math.prod(inputs), self.width)).reshape(shape)

        kernel = self.param("kernel", named_axes(init, *self.axes), (*inputs, self.width))
        zeros = named_axes(nn.initializers.zeros, self.axes[-1])
        bias = self.param("bias", zeros, (self.width,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        product = jnp.tensordot(x, kernel, len(inputs), precision=of_products(self.dtype))
        return add_bias(product, bias)


class Conv(nn.Module):
    """A convolution with a square kernel, at one of `precision.PRECISIONS`."""

    channels: int
    size: int
    precision: str
    strides: tuple[int, int] = (1, 1)
    padding: str | tuple[tuple[int, int], ...] = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        init = named_axes(lecun, "kernel_h", "kernel_w", "conv_in", "conv_out")
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        product = convolution(x, kernel, self.strides, self.padding, self.precision)
        return add_bias(product, bias)
