"""The orders in which the sampler reveals an image's positions.

An order lists all L positions, row-major; its last entry is revealed first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Key

from tokenbridge_jax.runtime.errors import UserError

# "confidence" finds its order while it samples; it starts from a random one.
ORDERS = ("random", "raster", "halton", "confidence")


def make_orders(
    name: str,
    seed: int | Integer[Array, ""],
    sample_indices: Int[Array, " B"],
    positions: int,
) -> Int[Array, "B L"]:
    """An order of the positions for every sample; only random orders differ between samples.

    Args:
      name: one of `ORDERS`.
      seed: fixes a random order, together with the sample index.
      sample_indices: the global number of every sample.
      positions: L.

    Raises:
      UserError: the order is "halton" and L is not a square number.
    """
    if name == "raster":
        order = np.arange(positions)
    elif name == "halton":
        grid = round(positions**0.5)
        if grid * grid != positions:
            raise UserError(f"sampling.order='halton' needs a square grid, not {positions} places")
        order = halton_order(grid, grid)
    else:
        return random_orders(seed, sample_indices, positions)
    return jnp.tile(jnp.asarray(order[::-1], jnp.int32), (len(sample_indices), 1))


def random_orders(
    seed: int | Integer[Array, ""], sample_indices: Int[Array, " B"], positions: int
) -> Int[Array, "B L"]:
    """A random order of the positions for every sample, from the seed and its sample index."""
    keys = sample_keys(seed, sample_indices)[:, 0]
    return jax.vmap(lambda key: jax.random.permutation(key, positions))(keys)


def sample_keys(
    seed: int | Integer[Array, ""], sample_indices: Int[Array, " B"]
) -> Key[Array, "B 2"]:
    """Two keys per sample: one for its order, one for its indices."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(sample_indices)


def halton_order(height: int, width: int) -> np.ndarray:
    """Cells of a grid in the order in which the Halton sequence first reaches them.

    The sequence (bases 2 along x and 3 along y) covers the grid evenly from its first points on
    (Halton, 1960). Its coordinates are exact fractions here. If they were rounded, a point on a
    border could fall into either cell.

    Returns:
      int array `[height * width]` of row-major cells, the first one first.
    """
    points = height * width
    while True:
        points *= 2
        x, y = (_halton_cells(points, base, of) for base, of in ((2, width), (3, height)))
        cells, first = np.unique(y * width + x, return_index=True)
        if len(cells) == height * width:
            return cells[np.argsort(first)]


def _halton_cells(points: int, base: int, cells: int) -> np.ndarray:
    """For the first radical inverses: which of `cells` equal parts of [0, 1) contains them."""
    rest = np.arange(points)
    reversed_digits, scale = np.zeros(points, np.int64), 1
    while rest.any():
        reversed_digits = reversed_digits * base + rest % base
        rest, scale = rest // base, scale * base
    return reversed_digits * cells // scale


def hidden_first(orders: Int[Array, "B L"], hidden: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """Moves hidden positions to the front of an image's order; otherwise the order stays."""
    visible_slots = ~jnp.take_along_axis(hidden, orders, axis=1)
    return jnp.take_along_axis(orders, jnp.argsort(visible_slots, axis=1, stable=True), axis=1)
