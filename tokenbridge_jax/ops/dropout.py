"""Dropout from a counter-based generator that costs one product per element.

An array is seen as rows of its last axis. The number of an element's row and the number of its
column are hashed, each with one word of a random key; the product of the two odd 32-bit hashes
decides whether the element is kept. Whatever reads the element computes this again, in the forward
pass and in the backward pass, so neither random bits nor masks are stored. The numbers are the
element's place in the whole array, so the result does not depend on the number of devices.

Two rows are one row of random numbers, times two random odd factors modulo 2^32: their masks are
as independent as the successive numbers of a multiplicative congruential generator with a random
multiplier. The same holds for columns.

(Threefry, JAX's default generator, takes about a hundred operations for an element, which would be
slower than the matrix products before and after it.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt32

from tokenbridge_jax.runtime.meshes import batch_shard


def seed_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """The two words of a random key that `keep` hashes with."""
    words = jax.random.key_data(key).reshape(-1)
    return words[np.array([0, -1])]


def keep(
    first: UInt32[Array, ""],
    second: UInt32[Array, ""],
    row: UInt32[Array, "..."],
    column: UInt32[Array, "..."],
    rate: float,
) -> Bool[Array, "..."]:
    """Which elements are kept: independent draws of probability 1 - `rate`.

    Args:
      first: the first word of the seed.
      second: the second word.
      row: the numbers of the elements' rows. Rows 2^32 apart have the same draws.
      column: the numbers of their columns; rows and columns are broadcast.
      rate: the probability of dropping an element, rounded to a multiple of 2^-32.
    """
    of_row = _hash(row * np.uint32(0x9E3779B1) + first, 0x7FEB352D)
    of_column = _hash(column * np.uint32(0x85EBCA6B) + second, 0x846CA68B)
    return of_row * of_column >= np.uint32(round(rate * 2**32))


def _hash(x: UInt32[Array, "..."], factor: int) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * np.uint32(factor)
    # An odd number, because a product with an even one has fewer values.
    return (x ^ (x >> 15)) * np.uint32(0x2C1B3C6D) | np.uint32(1)


def keep_elements(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float
) -> Bool[Array, "..."]:
    """`keep` for all elements of an array `[..., columns]`, with rows in row-major order."""
    # Where the array is one device's part of the batch, the first axis goes on from there.
    row = jnp.full(shape, batch_shard(), jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return keep(seed[0], seed[1], row, column, rate)


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
