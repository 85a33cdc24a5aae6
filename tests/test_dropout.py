"""The random bits of dropout's generator, and dropout itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny_model import normal, on_mesh, shard_shapes

from tokenbridge_jax.ops.dropout import drop, keep, keep_elements, seed_words

GROUP = 8
GROUPS = 2**15
SEED = seed_words(jax.random.key(7))

_keep = jax.jit(keep, static_argnums=4)


def assert_independent(kept: np.ndarray, rate: float) -> None:
    """A chi-square test of the patterns of 2, 4 and 8 neighbours in `[..., 8]`.

    The expected patterns are independent draws of probability 1 - `rate`. Rare patterns share a
    cell.
    """
    for size in (2, 4, GROUP):
        groups = np.asarray(kept).reshape(-1, size)
        seen = np.bincount(groups @ (1 << np.arange(size)), minlength=2**size)
        ones = np.array([pattern.bit_count() for pattern in range(2**size)])
        expected = len(groups) * (1 - rate) ** ones * rate ** (size - ones)
        cell = np.where(expected < 5, 2**size, np.arange(2**size))
        _, cell = np.unique(cell, return_inverse=True)
        seen, expected = np.bincount(cell, seen), np.bincount(cell, expected)
        statistic = np.sum((seen - expected) ** 2 / expected)
        assert stats.chi2.sf(statistic, len(seen) - 1) > 1e-5, f"patterns of {size}"


def counters(stride: int = 1, seed: int = 0) -> jax.Array:
    """Groups of counters with distance `stride` and random first counters."""
    start = np.random.default_rng(seed).integers(2**32, size=(GROUPS, 1), dtype=np.uint32)
    return jnp.asarray(start + np.uint32(stride) * np.arange(GROUP, dtype=np.uint32))


# --- The generator --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.1, 0.5, 0.9])
def test_the_share_kept_is_one_minus_the_rate(rate: float):
    shape = (1024, 1024)
    for key in jax.random.split(jax.random.key(0), 4):
        share = np.mean(np.asarray(keep_elements(seed_words(key), shape, rate)))
        # Five standard deviations of a binomial distribution.
        assert abs(share - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / (1024 * 1024))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate: float):
    """Neighbours along any axis of an array: the distance of their rows or columns is a stride."""
    others = jnp.asarray(np.random.default_rng(1).integers(2**20, size=(GROUPS, 1)), jnp.uint32)
    one = jnp.uint32(0)
    for stride in (*(2**bit for bit in range(21)), 3, 20, 320, 1024 * 3, 320 * 320):
        along = counters(stride, seed=stride)
        for other in (others, one):
            assert_independent(_keep(*SEED, along, other, rate), rate)
            assert_independent(_keep(*SEED, other, along, rate), rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_blocks_are_independent(rate: float, shape: tuple[int, int]):
    """All patterns of the eight elements of a block, with rows and columns in common."""
    height, width = shape
    for distance in (1, 16, 1024):
        kept = np.asarray(keep_elements(SEED, (2048, 2048), rate))
        blocks = kept.reshape(-1, height, min(distance, 2048 // height), 2048)
        blocks = blocks.reshape(*blocks.shape[:3], -1, width, min(distance, 2048 // width))
        assert_independent(blocks.transpose(0, 2, 3, 5, 1, 4).reshape(-1, GROUP), rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_mask_has_the_singular_values_and_the_spectrum_of_noise(rate: float):
    """No direction of rows, columns or frequencies stands out of independent draws.

    The largest singular value of n x m independent entries of variance 1 is near
    sqrt(n) + sqrt(m) (Marchenko and Pastur); the power of a frequency has mean 1 and exceeds x with
    probability exp(-x).
    """
    n, m = 1024, 512
    for key in jax.random.split(jax.random.key(3), 3):
        kept = np.asarray(keep_elements(seed_words(key), (n, m), rate), np.float64)
        noise = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
        largest = np.linalg.norm(noise, 2)
        assert 0.97 < largest / (np.sqrt(n) + np.sqrt(m)) < 1.03
        power = np.abs(np.fft.fft2(noise)) ** 2 / (n * m)
        assert power.max() < np.log(n * m / 1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("words", [(0,), (1,), (0, 1)])
def test_either_word_of_the_seed_gives_another_mask(words: tuple[int, ...], rate: float):
    """The same elements, with seeds that share one word, or none."""
    rng = np.random.default_rng(3)
    rows, columns = (counters(seed=i)[:, 0] for i in range(2))
    for _ in range(4):
        seeds = seeds_with_other(words, GROUP, rng)
        masks = [_keep(*seed, rows, columns, rate) for seed in seeds]
        assert_independent(np.stack(masks, axis=1), rate)


def seeds_with_other(words: tuple[int, ...], count: int, rng: np.random.Generator) -> jax.Array:
    """Random seeds that differ in these words."""
    seeds = np.tile(rng.integers(2**32, size=2, dtype=np.uint32), (count, 1))
    for word in words:
        seeds[:, word] = rng.integers(2**32, size=count, dtype=np.uint32)
    return jnp.asarray(seeds)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_key_gives_another_mask(rate: float):
    key = jax.random.key(0)
    for keys in (
        jax.random.split(key, GROUP),
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(GROUP)),
        jax.random.split(jax.random.key(1, impl="rbg"), GROUP),
    ):
        masks = [keep_elements(seed_words(key), (GROUPS // 64, 64), rate) for key in keys]
        assert_independent(np.stack(masks, axis=-1), rate)


def test_rows_are_numbered_in_order():
    rows, columns = map(jnp.asarray, np.divmod(np.arange(60, dtype=np.uint32), 5))
    kept = np.asarray(_keep(*SEED, rows, columns, 0.3))
    assert 0 < kept.sum() < 60
    np.testing.assert_array_equal(keep_elements(SEED, (3, 4, 5), 0.3), kept.reshape(3, 4, 5))


def test_a_seed_is_two_words_of_the_key():
    assert seed_words(jax.random.key(5)).tolist() == [0, 5]
    words = jax.random.key_data(jax.random.key(5, impl="rbg"))
    assert seed_words(jax.random.key(5, impl="rbg")).tolist() == words[np.array([0, 3])].tolist()


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_or_divides_and_preserves_the_mean(rate: float):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, size=(400, 500)), jnp.float32)
    y = np.asarray(drop(x, SEED, rate))
    kept = np.asarray(keep_elements(SEED, x.shape, rate))
    np.testing.assert_allclose(y, np.where(kept, np.asarray(x) / (1 - rate), 0), rtol=1e-6)
    deviation = np.sqrt(rate / (1 - rate) * np.sum(np.square(x))) / x.size
    assert abs(y.mean() - np.mean(x)) < 5 * deviation


def test_bfloat16_is_divided_by_the_exact_rate():
    """bfloat16 cannot represent 0.9; the nearest number would make every result 0.2 % wrong."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 100_000), jnp.bfloat16)
    y = np.asarray(drop(x, SEED, 0.1), np.float64)
    exact = np.asarray(x, np.float64) / 0.9
    assert np.mean(y[y > 0] / exact[y > 0]) == pytest.approx(1, abs=1e-4)


def test_dropout_of_rate_0_changes_nothing():
    x = jnp.linspace(-1, 1, 1000)
    np.testing.assert_array_equal(drop(x, SEED, 0.0), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_drops_what_was_dropped(dtype):
    x, d_y = (normal(i, 30, 40, dtype=dtype) for i in range(2))
    y, backward = jax.vjp(lambda x: drop(x, SEED, 0.3), x)
    (d_x,) = backward(d_y)
    assert y.dtype == d_x.dtype == dtype
    np.testing.assert_array_equal(d_x != 0, y != 0)
    np.testing.assert_array_equal(d_x, drop(d_y, SEED, 0.3))
    # The backward pass keeps only the seed.
    assert [leaf.shape for leaf in jax.tree.leaves(backward)] == [(2,)]


def test_what_is_dropped_does_not_depend_on_the_devices():
    x = normal(0, 8, 6, 16)

    @jax.jit
    def run(x):
        y, backward = jax.vjp(lambda x: drop(x, SEED, 0.3), x)
        return y, backward(y)[0]

    actual = on_mesh(run, (x, (("data", "fsdp"), None, "tensor")))
    for mine, other in zip(actual, run(x), strict=True):
        assert shard_shapes(mine) == {(2, 6, 8)}
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)
