"""Attention over the channels of a position while they are drawn one by one.

The keys and values of earlier channels are cached. One step adds a key and a value, and computes
the attention of the newest channel. On GPUs that is one Pallas kernel, whose programs each do one
head of one position: too little for a matrix product, so rows are multiplied and summed. Other
platforms, and the small float32 models of tests, run the plain version.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokenbridge_jax.ops.attention import normed_heads, plain_attention
from tokenbridge_jax.ops.norm import NORM_EPSILON
from tokenbridge_jax.ops.pallas import (
    HEADS_AXES,
    MASKED,
    QKV_AXES,
    by_platform,
    gpu_call,
    has_kernel,
    on_shards,
    pl,
    pl_triton,
)

# Of a program. A single warp needs no shared memory for its sums, and there are enough programs.
WARPS = 1


class Cache(NamedTuple):
    """Normed keys and values of the places before `place`, the one to compute.

    What they contain from `place` on is ignored.
    """

    keys: Float[Array, "N H T K"]
    values: Float[Array, "N H T K"]
    place: Int[Array, ""]


def attend_cached(
    qkv: Float[Array, "N 1 3 H K"],
    bias: Float[Array, "3 H K"],
    norms: tuple[Float[Array, " K"], ...],
    cache: Cache,
) -> tuple[Float[Array, "N 1 H K"], Cache]:
    """`channel_attention.attend_channels` at one place, given the places before it.

    Args:
      qkv: the place's query, key and value, without their bias.
      bias: of query, key and value.
      norms: float32 scale and bias of the query's LayerNorm, then of the key's. They are separate
        arrays, because joining them would cost an operation.
      cache: the places before.

    Returns:
      The result, and the cache with this place's key and value written. The compiler writes them
      into the old arrays if those are not needed again.
    """
    kernels = {"cuda": kernel_cached_attention} if has_kernel(qkv) else {}
    return by_platform(plain_cached_attention, kernels, qkv, bias, norms, cache)


def plain_cached_attention(
    qkv: jax.Array, bias: jax.Array, norms: tuple[jax.Array, ...], cache: Cache
) -> tuple[jax.Array, Cache]:
    """`attend_cached` in plain operations."""
    q, k, v = normed_heads(qkv, bias, norms)

    def write(cached: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, x.swapaxes(1, 2), cache.place, axis=2)

    keys, values = write(cache.keys, k), write(cache.values, v)
    seen = jnp.arange(keys.shape[2]) <= cache.place
    out = plain_attention(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), seen[None, None])
    return out, Cache(keys, values, cache.place)


def kernel_cached_attention(
    qkv: jax.Array,
    bias: jax.Array,
    norms: tuple[jax.Array, ...],
    cache: Cache,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Cache]:
    """`attend_cached` on a GPU."""

    def call(_: jax.Array, place: jax.Array, *arrays: jax.Array) -> Any:
        *norms, bias, qkv, keys, values = arrays
        count, heads, width = qkv.shape[0], *qkv.shape[3:]
        run = gpu_call(
            _kernel,
            grid=(count, heads),
            out_shape=(
                jax.ShapeDtypeStruct((count, heads, width), qkv.dtype),
                jax.ShapeDtypeStruct(keys.shape, keys.dtype),
                jax.ShapeDtypeStruct(values.shape, values.dtype),
            ),
            input_output_aliases={7: 1, 8: 2},
            warps=WARPS,
            interpret=interpret,
        )
        bias, qkv = bias.reshape(-1, width), qkv.reshape(count, -1, width)
        out, keys, values = run(place, *norms, bias, qkv, keys, values)
        return out[:, None], keys, values

    inputs = (*[(None,)] * 5, (None, "heads", None), QKV_AXES, _CACHE, _CACHE)
    outputs = (HEADS_AXES, _CACHE, _CACHE)
    arrays = cache.place[None], *norms, bias, qkv, cache.keys, cache.values
    out, keys, values = on_shards(call, inputs, outputs, jnp.zeros(2, jnp.uint32), *arrays)
    return out, Cache(keys, values, cache.place)


_CACHE = ("batch", "heads", None, None)


def _kernel(
    place_ref: Any,
    q_scale_ref: Any,
    q_bias_ref: Any,
    k_scale_ref: Any,
    k_bias_ref: Any,
    bias_ref: Any,
    qkv_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
    new_keys_ref: Any,
    new_values_ref: Any,
) -> None:
    """One head of one position. Tiles have powers of two of rows and columns."""
    position, head = pl.program_id(0), pl.program_id(1)
    heads, length, width = keys_ref.shape[1:]
    place = place_ref[0]
    rows = jnp.arange(pl.next_power_of_2(length))[:, None]
    columns = jnp.arange(pl.next_power_of_2(width))
    exists = columns < width

    def load(ref: Any) -> jax.Array:
        return pl_triton.load(ref, mask=exists, other=0.0)

    def store(ref: Any, x: jax.Array) -> None:
        pl_triton.store(ref, x.astype(out_ref.dtype), mask=exists)

    def load_part(part: int) -> jax.Array:
        row = part * heads + head
        return load(qkv_ref.at[position, row, columns]) + load(bias_ref.at[row, columns])

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x) / width

    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        normal = x.astype(jnp.float32)
        normal = jnp.where(exists, normal - mean(normal), 0.0)
        normal *= jax.lax.rsqrt(mean(normal * normal) + NORM_EPSILON)
        return (normal * scale + bias).astype(x.dtype)

    def load_cache(ref: Any) -> jax.Array:
        earlier = (rows < place) & exists[None]
        return pl_triton.load(ref.at[position, head, rows, columns[None]], mask=earlier, other=0.0)

    def extend(cache: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(rows == place, new[None], cache).astype(jnp.float32)

    # All loads come first: memory answers while queries and keys are normalized.
    keys, values = load_cache(keys_ref), load_cache(values_ref)
    q, k, v = (load_part(part) for part in range(3))
    norms = [load(ref.at[columns]) for ref in (q_scale_ref, q_bias_ref, k_scale_ref, k_bias_ref)]
    q, k = norm(q, *norms[:2]), norm(k, *norms[2:])
    scores = jnp.sum(extend(keys, k) * q.astype(jnp.float32)[None], axis=1, keepdims=True)
    scores = jnp.where(rows <= place, scores * width**-0.5, MASKED)
    weights = jnp.exp(scores - jnp.max(scores))
    weights = (weights / jnp.sum(weights)).astype(v.dtype).astype(jnp.float32)
    store(out_ref.at[position, head, columns], jnp.sum(weights * extend(values, v), axis=0))
    store(new_keys_ref.at[position, head, place, columns], k)
    store(new_values_ref.at[position, head, place, columns], v)
