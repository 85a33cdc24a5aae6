"""Dropout from a counter-based generator that costs a few integer operations an element.

Whether element i is kept is a hash of i and of a random key, computed where it is needed: inside
the fused kernel that reads the element, in the forward pass and again in the backward pass. No
random bits and no mask are stored, and since i is the element's place in the whole array, the same
array is treated the same on any number of devices. Elements 2^32 apart share their draw.

(Threefry, JAX's default generator, takes about ten times the operations, which is more than the
products it would stand between leave room for.)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt32


def seed_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """The two words of a random key that `keep` hashes with."""
    words = jax.random.key_data(key).reshape(-1)
    return words[np.array([0, -1])]


def keep(
    first: UInt32[Array, ""], second: UInt32[Array, ""], counter: UInt32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Whether each element is kept: independent draws of probability 1 - `rate`.

    Three multiplications with xor-shifts between them, and a word of the seed before each of those.

    Args:
      first: a word of the seed.
      second: another.
      counter: the elements' numbers.
      rate: the probability of not being kept, to a multiple of 2^-32.
    """
    x = counter * np.uint32(0x9E3779B1) + first
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D) + second
    # The comparison looks at the high bits, which the last product has mixed best.
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x >= np.uint32(round(rate * 2**32))


def keep_elements(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float
) -> Bool[Array, "..."]:
    """`keep` for all elements of an array, numbered in row-major order."""
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return keep(seed[0], seed[1], counter, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x: Float[Array, "..."], seed: UInt32[Array, "2"], rate: float) -> Float[Array, "..."]:
    """Zeroes each element with probability `rate` and divides the others by 1 - `rate`."""
    if not rate:
        return x
    # In float32, whatever x is: bfloat16 has no 0.9.
    scaled = (x.astype(jnp.float32) * np.float32(1 / (1 - rate))).astype(x.dtype)
    return jnp.where(keep_elements(seed, x.shape, rate), scaled, 0)


# Linear in x, so the gradient is the same function of the gradient.
dropout.defvjp(
    lambda x, seed, rate: (dropout(x, seed, rate), seed),
    lambda rate, seed, d_y: (dropout(d_y, seed, rate), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gelu_dropout(
    x: Float[Array, "..."], seed: UInt32[Array, "2"], rate: float
) -> Float[Array, "..."]:
    """Exact GELU, x Phi(x), in float32, then dropout. The backward pass keeps nothing but x."""
    wide = x.astype(jnp.float32)
    return dropout(wide * _normal_cdf(wide), seed, rate).astype(x.dtype)


def _gelu_dropout_gradient(rate: float, residuals: Any, d_y: jax.Array) -> tuple[jax.Array, None]:
    x, seed = residuals
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * np.float32((2 * math.pi) ** -0.5)
    slope = _normal_cdf(wide) + wide * density
    return dropout(slope * d_y.astype(jnp.float32), seed, rate).astype(x.dtype), None


def _normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


gelu_dropout.defvjp(
    lambda x, seed, rate: (gelu_dropout(x, seed, rate), (x, seed)), _gelu_dropout_gradient
)
