"""Dropout from a counter-based generator that costs a few integer operations per element.

A hash of the element's number and of a random key decides whether the element is kept. The kernel
that reads the element computes the hash, in the forward pass and again in the backward pass, so
neither random bits nor masks are stored. The number is the element's place in the whole array, so
the result does not depend on the number of devices. Elements 2^32 apart share their draw. In the
widest arrays, the MLP's units, two elements share a hash and use 16 bits each.

(Threefry, JAX's default generator, takes about ten times as many operations. That would be slower
than the matrix products before and after it.)
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt32

# The distance, in columns, of two units that share a hash; a kernel holds twice as many columns.
PAIR_STRIDE = 512


def seed_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """The two words of a random key that `keep` hashes with."""
    words = jax.random.key_data(key).reshape(-1)
    return words[np.array([0, -1])]


def keep(
    first: UInt32[Array, ""], second: UInt32[Array, ""], counter: UInt32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Which elements are kept: independent draws of probability 1 - `rate`.

    Args:
      first: the first word of the seed.
      second: the second word.
      counter: the elements' numbers.
      rate: the probability of dropping an element, rounded to a multiple of 2^-32.
    """
    return _hash(first, second, counter) >= np.uint32(round(rate * 2**32))


def keep_pair(
    first: UInt32[Array, ""], second: UInt32[Array, ""], counter: UInt32[Array, "..."], rate: float
) -> tuple[Bool[Array, "..."], Bool[Array, "..."]]:
    """Two independent decisions of 16 bits from one hash; the first one equals `keep`'s.

    Args:
      first: the first word of the seed.
      second: the second word.
      counter: the pairs' numbers.
      rate: the probability of dropping an element, rounded by `pair_rate`.
    """
    word = _hash(first, second, counter)
    threshold = np.uint32(pair_rate(rate) * 2**32)
    # The last product mixes the low bits least, so they decide together with the high ones.
    return word >= threshold, word ^ (word << 16) >= threshold


def pair_rate(rate: float) -> float:
    """The multiple of 2^-16, below 1, that `keep_pair` uses for `rate`: 6554 / 65536 for 0.1."""
    return min(round(rate * 2**16), 2**16 - 1) / 2**16


def _hash(
    first: UInt32[Array, ""], second: UInt32[Array, ""], counter: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    x = counter * np.uint32(0x9E3779B1) + first
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D) + second
    # Comparisons mostly see the high bits, which the last product mixes best.
    return (x ^ (x >> 15)) * np.uint32(0x846CA68B)


def keep_units(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float
) -> Bool[Array, "... F"]:
    """`keep_pair` for all elements of an array, numbered in row-major order.

    Partners are PAIR_STRIDE columns apart, and the pair has the number of the first one.
    """
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    to_partner = column & np.uint32(PAIR_STRIDE)
    kept, kept_partner = keep_pair(seed[0], seed[1], counter - to_partner, rate)
    return jnp.where(to_partner == 0, kept, kept_partner)


def keep_elements(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float
) -> Bool[Array, "..."]:
    """`keep` for all elements of an array, numbered in row-major order."""
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return keep(seed[0], seed[1], counter, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: Float[Array, "..."], seed: UInt32[Array, "2"], rate: float) -> Float[Array, "..."]:
    """Zeroes each element with probability `rate` and divides the others by 1 - `rate`."""
    if not rate:
        return x
    # In float32 for any x, because bfloat16 cannot represent 0.9.
    scaled = (x.astype(jnp.float32) * np.float32(1 / (1 - rate))).astype(x.dtype)
    return jnp.where(keep_elements(seed, x.shape, rate), scaled, 0)


# Linear in x, so the gradient is the same function of the gradient.
drop.defvjp(
    lambda x, seed, rate: (drop(x, seed, rate), seed),
    lambda rate, seed, d_y: (drop(d_y, seed, rate), None),
)
