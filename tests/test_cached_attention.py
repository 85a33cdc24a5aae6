"""Attention with cached keys and values, against the attention over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    TINY,
    head_method,
    normal,
    on_mesh,
    relative_error,
    shard_shapes,
    triton_kernels,
)

from tokenbridge_jax.ops.cached_attention import (
    Cache,
    attend_cached,
    kernel_cached_attention,
    plain_cached_attention,
)
from tokenbridge_jax.ops.channel_attention import plain_channel_attention

STEPS = {
    "plain": jax.jit(plain_cached_attention),
    "kernel": jax.jit(functools.partial(kernel_cached_attention, interpret=True)),
}


def arguments(count: int, channels: int, heads: int, width: int, dtype=jnp.float32):
    """Products and bias of whole sequences, weights of the norms, and full caches of noise."""
    qkv = 2 * normal(0, count, channels, 3, heads, width, dtype=dtype)
    bias, norms = normal(1, 3, heads, width, dtype=dtype), normal(2, 4, width)
    noise = 100 * normal(3, 2, count, heads, channels, width, dtype=dtype)
    return qkv, bias, tuple(norms), *noise


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("count", "channels", "heads", "width"), [(5, 4, 2, 16), (1, 8, 3, 20), (3, 6, 1, 128)]
)
def test_all_places_together_are_causal_attention(
    name: str, dtype, count: int, channels: int, heads: int, width: int
):
    """For any earlier content of the caches."""
    qkv, bias, norms, keys, values = arguments(count, channels, heads, width, dtype)
    seed = jnp.zeros(2, jnp.uint32)
    whole = jax.jit(plain_channel_attention, static_argnums=(4, 5))
    expected = whole(qkv, bias, jnp.stack(norms), seed, 0.0, True)
    for place in range(channels):
        step = qkv[:, place : place + 1]
        cache = Cache(keys, values, jnp.int32(place))
        out, (keys, values, _) = STEPS[name](step, bias, norms, cache)
        assert out.dtype == keys.dtype == values.dtype == dtype
        limit = 3e-6 if dtype == jnp.float32 else 0.01
        assert relative_error(out[:, 0], expected[:, place]) < limit
    np.testing.assert_array_equal(values.swapaxes(1, 2), qkv[:, :, 2] + bias[2][None, None])


@pytest.mark.parametrize("place", [0, 2, 5])
def test_the_kernel_writes_one_row_and_agrees_with_the_plain_version(place: int):
    qkv, bias, norms, *caches = arguments(7, 6, 3, 16, jnp.bfloat16)
    of_place = (qkv[:, place, None], bias, norms, Cache(*caches, jnp.int32(place)))
    actual, expected = (STEPS[name](*of_place) for name in ("kernel", "plain"))
    assert relative_error(actual[0], expected[0]) < 4e-3
    others = np.arange(6) != place
    for before, mine, other in zip(caches, actual[1][:2], expected[1][:2], strict=True):
        np.testing.assert_array_equal(mine[:, :, others], before[:, :, others])
        assert relative_error(mine[:, :, place], other[:, :, place]) < 4e-3
        assert not np.array_equal(mine[:, :, place], before[:, :, place])


@pytest.mark.parametrize(("count", "heads"), [(8, 4), (4, 3), (3, 2)])
def test_the_kernel_is_the_same_on_any_mesh(count: int, heads: int):
    """Also where the mesh does not divide the positions or the heads."""
    qkv, bias, norms, keys, values = arguments(count, 4, heads, 16)
    expected = STEPS["kernel"](qkv[:, 2:3], bias, norms, Cache(keys, values, jnp.int32(2)))
    batch = ("data", "fsdp") if count % 4 == 0 else None
    tensor = "tensor" if heads % 2 == 0 else None
    actual = on_mesh(
        lambda qkv, bias, norms, caches, place: STEPS["kernel"](
            qkv, bias, norms, Cache(*caches, place)
        ),
        (qkv[:, 2:3], (batch, None, None, tensor)),
        (bias, (None, tensor)),
        (norms, ()),
        ((keys, values), (batch, tensor)),
        (jnp.int32(2), ()),
    )
    arrays = (jax.tree.leaves(found)[:3] for found in (actual, expected))
    for mine, other, axis in zip(*arrays, (2, 1, 1), strict=True):
        assert relative_error(mine, other) < 1e-6
        share = list(mine.shape)
        share[0] //= 4 if batch else 1
        share[axis] //= 2 if tensor else 1
        assert shard_shapes(mine) == {tuple(share)}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.usefixtures("gpu_to_lower_for")
@pytest.mark.parametrize(
    ("dtype", "width", "kernels"),
    [(jnp.bfloat16, 16, 1), (jnp.float32, 16, 0), (jnp.bfloat16, 8, 0)],
)
def test_gpus_run_one_kernel_and_other_platforms_none(dtype, width: int, kernels: int):
    qkv, bias, norms, *caches = arguments(2, 4, 2, width, dtype)
    traced = jax.jit(attend_cached).trace(qkv[:, :1], bias, norms, Cache(*caches, jnp.int32(0)))
    assert triton_kernels(traced) == {"cuda": kernels, "cpu": 0, "tpu": 0}


def test_a_position_alone_is_drawn_as_among_others(params):
    feature, keys = normal(0, 3, TINY.decoder_width), jax.random.split(jax.random.key(0), 3)

    def draw(positions):
        sample = head_method(TINY, "sample")
        return sample(params, feature[positions], keys[positions], jnp.float32(1))[0]

    alone = np.concatenate([draw(slice(i, i + 1)) for i in range(3)])
    np.testing.assert_array_equal(draw(slice(3)), alone)
