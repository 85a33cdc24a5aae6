"""The orders of positions: Halton, raster, random, and hidden positions first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.orders import (
    ORDERS,
    halton_order,
    hidden_first,
    make_orders,
    random_orders,
)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (1, 1), (5, 7), (8, 3)])
def test_halton_is_the_published_sequence(height: int, width: int):
    """The cells of scipy's points, moved a little to the right because scipy rounds them."""
    points = stats.qmc.Halton(2, scramble=False).random(8 * height * width + 64)
    x, y = np.floor((points + 1e-12) * [width, height]).astype(int).T
    expected = list(dict.fromkeys((y * width + x).tolist()))
    found = halton_order(height, width)
    assert found.tolist() == expected
    assert sorted(found) == list(range(height * width))


def test_every_order_is_a_permutation_and_only_random_ones_depend_on_the_sample():
    numbers = jnp.arange(3)
    for name in ORDERS:
        orders = np.asarray(make_orders(name, 7, numbers, 16))
        assert (np.sort(orders) == np.arange(16)).all()
        assert (len(np.unique(orders, axis=0)) == 3) == (name in ("random", "confidence"))
    # The last entry is revealed first.
    assert make_orders("raster", 0, numbers, 16)[0].tolist() == list(range(15, -1, -1))
    assert make_orders("halton", 0, numbers, 16)[0, ::-1].tolist() == halton_order(4, 4).tolist()
    with pytest.raises(UserError, match="needs a square grid, not 8 places"):
        make_orders("halton", 0, numbers, 8)


def test_hidden_positions_come_first_and_keep_their_order():
    rng = np.random.default_rng(0)
    orders = np.asarray(random_orders(0, jnp.arange(20), 30))
    hidden = rng.random((20, 30)) < rng.random((20, 1))
    found = np.asarray(jax.jit(hidden_first)(orders, hidden))
    for order, mask, arranged in zip(orders, hidden, found, strict=True):
        expected = [p for p in order if mask[p]] + [p for p in order if not mask[p]]
        assert arranged.tolist() == expected
