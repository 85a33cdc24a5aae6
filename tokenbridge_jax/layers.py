"""The layers that all networks share. Gradients of parameters are summed in float32.

The gradient of a bias, or of an embedding, is a sum over all positions of all images. In bfloat16
the sum would stop growing once it is 256 times as large as its next term. So a parameter is copied,
or looked up, in float32 and then cast to the dtype of the model: in the backward pass the copies'
gradients are cast to float32 before they are summed. (Compilers fuse the casts: they cost no pass
over memory.)

No gradient is a scatter-add with repeated indices. GPUs add such terms in the order in which they
come, so that the same program has other sums the next time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float, Integer

from tokenbridge_jax.ops.float8 import float8_product
from tokenbridge_jax.ops.norm import normalize
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "T D"], indices: Integer[Array, "..."], dtype: Any
) -> Float[Array, "... D"]:
    """The rows `table[indices]`, in `dtype`.

    The gradient of the table is the product of one-hot vectors and the rows' gradients, with sums
    in float32: exact but for their rounding, and the same at every run. A row of width D costs
    2 T D FLOPs, far below a transformer layer's for the tables of a model.

    Args:
      table: float32.
      indices: 0..T-1.
      dtype: of the result; also of the operands of the product, which are exact in it.
    """
    return table[indices].astype(dtype)


def _look_up(table: Any, indices: Any, dtype: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    return look_up(table, indices, dtype), (table, indices)


def _sum_rows(
    dtype: Any, looked_up: tuple[jax.Array, jax.Array], d_rows: jax.Array
) -> tuple[jax.Array, None]:
    table, indices = looked_up
    chosen = jax.nn.one_hot(indices, len(table), axis=0, dtype=dtype)
    precision = of_products(dtype)
    d_table = jnp.tensordot(
        chosen, d_rows, indices.ndim, precision=precision, preferred_element_type=jnp.float32
    )
    return d_table.astype(table.dtype), None


look_up.defvjp(_look_up, _sum_rows)


def pick(
    x: Float[Array, "..."], indices: Integer[Array, "..."], axis: int = -1
) -> Float[Array, "..."]:
    """One value along an axis of x for each of `indices`, whose shape lacks this axis.

    It is a sum of that value and zeros, so the gradient is element by element. NaN for an index
    outside the axis, as with `jnp.take_along_axis`.
    """
    indices = jnp.expand_dims(indices.astype(jnp.int32), axis)
    chosen = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim) == indices
    picked = jnp.sum(jnp.where(chosen, x, 0), axis=axis)
    inside = (indices >= 0) & (indices < x.shape[axis])
    return jnp.where(inside.squeeze(axis), picked, jnp.nan)


class Layer(nn.Module):
    """A module whose parameters are quick to look up.

    Flax traces the initialiser of every parameter that is there already, to compare shapes. With
    hundreds of parameters this was a seventh of a warm start's tracing.
    """

    def param(self, name: str, init: Any, shape: tuple[int, ...]) -> Any:  # type: ignore[override]
        """As in Flax: the parameter, which `init(key, shape)` draws if it is not there.

        Raises:
          ScopeParamShapeError: the parameter has another shape.
        """
        if not self.has_variable("params", name):
            return super().param(name, init, shape)
        value = nn.unbox(self.get_variable("params", name))
        if value.shape != shape:
            raise ScopeParamShapeError(name, "/".join(self.path), value.shape, shape)
        return value


def linear_product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int, float8: bool
) -> Float[Array, "..."]:
    """`jnp.tensordot(x, kernel, axes)` at the precision of their dtype, or of 8-bit operands."""
    if float8:
        return float8_product(x, kernel, axes)
    return jnp.tensordot(x, kernel, axes, precision=of_products(x.dtype))


def _init_matrix(
    init: Callable[..., jax.Array], size: tuple[int, int], key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """A kernel that is drawn as a matrix of this size."""
    return init(key, size).reshape(shape)


class Dense(Layer):
    """`x @ kernel + bias` over x's last axes, as many as the kernel has input axes.

    Attributes:
      features: the sizes of the output axes.
      axes: the logical axes of the kernel, input axes first. The bias has the output axes.
      dtype: of the result.
      joined: whether the product sees heads and their width, two neighbouring axes, as one. On TPUs
        an array's last axis is padded to 128, so a compiler left alone with a narrow one moves it.
      init: draws the kernel as a matrix, inputs by outputs. The bias is 0.
      float8: whether the products have 8-bit operands (see `ops/float8.py`).
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    joined: bool = False
    init: Any = xavier
    float8: bool = False

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return add_bias(*self._product(x))

    def terms(self, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The product and the bias in `dtype`, for an operation of `ops/` that adds them itself."""
        product, bias = self._product(x)
        return product, bias.astype(self.dtype)

    @nn.compact
    def _product(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The product in `dtype` and the bias in float32."""
        outputs = len(self.features)
        contracted = len(self.axes) - outputs
        inputs = x.shape[x.ndim - contracted :]
        size = math.prod(inputs), math.prod(self.features)
        init = functools.partial(_init_matrix, self.init, size)
        kernel = self.param("kernel", named_axes(init, *self.axes), (*inputs, *self.features))
        zeros = named_axes(nn.initializers.zeros, *self.axes[contracted:])
        bias = self.param("bias", zeros, self.features)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        result = (*x.shape[: x.ndim - contracted], *self.features)
        if self.joined:
            first = self.axes.index("heads")
            size = math.prod(kernel.shape[first : first + 2])
            kernel = kernel.reshape(*kernel.shape[:first], size, *kernel.shape[first + 2 :])
            if first < contracted:
                contracted -= 1
                x = x.reshape(*x.shape[:-2], size)
        product = linear_product(x, kernel, contracted, self.float8)
        return product.reshape(result), bias


class LayerNorm(Layer):
    """LayerNorm over the last axis with float32 statistics; the result has `dtype`."""

    dtype: Any = jnp.float32

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return normalize(x, *self.weights(x.shape[-1])).astype(self.dtype)

    @nn.compact
    def weights(self, width: int) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Scale and bias, for an operation of `ops/` that normalizes by itself."""
        scale = self.param("scale", nn.initializers.ones, (width,))
        return scale, self.param("bias", nn.initializers.zeros, (width,))


class GroupNorm(Layer):
    """Group normalisation with 32 groups or fewer; the result is float32.

    The statistics take one pass: first every channel's sum and sum of squares, then those of the
    groups. They are sums of differences from the channel's middle pixel, so that a mean far from
    zero does not cancel the variance.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)

        # Neither the statistics nor their gradients depend on the origin.
        origin = jax.lax.stop_gradient(x[:, height // 2, width // 2])
        shifted = x - origin[:, None, None]
        channel_mean = jnp.mean(shifted, axis=(1, 2))
        channel_variance = jnp.mean(jnp.square(shifted), axis=(1, 2)) - jnp.square(channel_mean)
        # Rounding can make this negative if the middle pixel is far from all others.
        channel_variance = jnp.maximum(channel_variance, 0)

        groups = min(32, channels)
        means = (origin + channel_mean).reshape(batch, groups, -1)
        variances = channel_variance.reshape(batch, groups, -1)
        mean = jnp.mean(means, axis=-1, keepdims=True)
        variance = jnp.mean(variances + jnp.square(means - mean), axis=-1, keepdims=True)

        factors = jax.lax.rsqrt(variance + 1e-6) * scale.reshape(1, groups, -1)
        shape = (batch, 1, 1, channels)
        group_mean = jnp.broadcast_to(mean, factors.shape).reshape(shape)
        return (x - group_mean) * factors.reshape(shape) + bias.reshape(1, 1, 1, channels)


class Conv(Layer):
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
