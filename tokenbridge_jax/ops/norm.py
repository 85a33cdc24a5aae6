"""Layer normalisation as one expression, for the layers and for operations that include it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NORM_EPSILON = 1e-6


def normalize(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"] | None = None,
    bias: Float[Array, " D"] | None = None,
) -> Float[Array, "... D"]:
    """LayerNorm over the last axis, in float32 throughout; scale and bias are optional.

    It takes two passes: E[x^2] - E[x]^2 loses all digits where the mean is far above the deviation.
    """
    x = x.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    if scale is None or bias is None:
        return x
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)
