"""The kernels of `channel_attention.attend_channels` for TPUs.

A program takes 128 tokens: whole positions, eight of 16 channels, with all their heads. Their
scores are one `[keys, queries]` product, masked to the blocks on the diagonal. Most of the product
is wasted, but a matrix unit would be idle otherwise.

Inside, tokens are lanes, and the width of a head is rows. So norms reduce over rows, which moves
nothing between lanes, and a head is cut out without masks.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from tokenbridge_jax.ops.dropout import keep
from tokenbridge_jax.ops.norm import NORM_EPSILON
from tokenbridge_jax.ops.pallas import (
    HEADS_AXES,
    LOG2_E,
    MASKED,
    QKV_AXES,
    on_shards,
    pl,
    pl_tpu,
    product,
)
from tokenbridge_jax.ops.tpu_attention import LANES, fills_registers, heads_together

# The tokens of a program.
TOKENS = LANES


def takes(qkv: Float[Array, "N T 3 H K"]) -> bool:
    """Whether the kernels take these arrays: those of `fills_registers`, in whole positions."""
    return fills_registers(qkv) and TOKENS % qkv.shape[1] == 0


def forward(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    norms: Float[Array, "4 K"],
    seed: UInt32[Array, "2"],
    *,
    rate: float,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "N T H K"]:
    """The output of `attend_channels`."""

    def call(seed: jax.Array, norms: jax.Array, bias: jax.Array, qkv: jax.Array) -> jax.Array:
        blocks = _Blocks(norms, bias, qkv, total_heads=total_heads, rate=rate, causal=causal)
        return pl.pallas_call(
            functools.partial(_forward_kernel, blocks.tile),
            in_specs=blocks.inputs,
            out_specs=blocks.heads,
            out_shape=jax.ShapeDtypeStruct(blocks.arrays[-1].shape[1:], qkv.dtype),
            interpret=interpret,
            **blocks.settings,
        )(seed, *blocks.arrays).reshape(*qkv.shape[:2], *qkv.shape[3:])

    total_heads = qkv.shape[3]
    inputs = (_NORMS, QKV_AXES[2:], QKV_AXES)
    return on_shards(call, inputs, HEADS_AXES, seed, norms, bias, qkv)


def backward(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    norms: Float[Array, "4 K"],
    seed: UInt32[Array, "2"],
    d_out: Float[Array, "N T H K"],
    *,
    rate: float,
    causal: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "N T 3 H K"], Float[Array, "4 K"]]:
    """The gradients of `attend_channels` with respect to `qkv` and `norms`."""

    def call(
        seed: jax.Array, norms: jax.Array, bias: jax.Array, d_out: jax.Array, qkv: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        blocks = _Blocks(norms, bias, qkv, total_heads=total_heads, rate=rate, causal=causal)
        parts = blocks.arrays[-1]
        sums = (4, norms.shape[1], TOKENS)
        d_parts, d_norms = pl.pallas_call(
            functools.partial(_backward_kernel, blocks.tile),
            in_specs=[*blocks.inputs, blocks.heads],
            out_specs=[blocks.parts, pl.BlockSpec(sums, lambda n: (0, 0, 0))],
            out_shape=[
                jax.ShapeDtypeStruct(parts.shape, qkv.dtype),
                jax.ShapeDtypeStruct(sums, jnp.float32),
            ],
            interpret=interpret,
            **blocks.settings,
        )(seed, *blocks.arrays, d_out.reshape(parts.shape[1:]))
        d_qkv = jnp.moveaxis(d_parts, 0, 1).reshape(qkv.shape)
        return d_qkv, d_norms.sum(axis=-1)[None, None]

    total_heads = qkv.shape[3]
    inputs = (_NORMS, QKV_AXES[2:], HEADS_AXES, QKV_AXES)
    outputs = (QKV_AXES, ("batch", "heads", None, None))
    d_qkv, d_norms = on_shards(call, inputs, outputs, seed, norms, bias, d_out, qkv)
    return d_qkv, jnp.sum(d_norms, axis=(0, 1))


_NORMS = (None, None)


class _Blocks:
    """The arrays as the kernels read them, and the blocks of a program.

    Queries, keys and values are `[3, N T, H K]`: as the last axis but one, the three would be
    padded to eight.
    """

    def __init__(self, norms: jax.Array, bias: jax.Array, qkv: jax.Array, **settings: Any) -> None:
        count, length, _, heads, width = qkv.shape
        tokens, columns = count * length, heads * width
        parts = jnp.moveaxis(qkv.reshape(tokens, 3, columns), 1, 0)
        lanes = jnp.broadcast_to(norms[..., None], (*norms.shape, TOKENS))
        self.arrays = (lanes, bias.reshape(3, columns), parts)
        self.tile = functools.partial(_Tile, length=length, width=width, tokens=tokens, **settings)
        self.parts = pl.BlockSpec((3, TOKENS, columns), lambda n: (0, n, 0))
        self.heads = pl.BlockSpec((TOKENS, columns), lambda n: (n, 0))
        self.inputs = [
            pl.BlockSpec(memory_space=pl_tpu.SMEM),
            pl.BlockSpec(lanes.shape, lambda n: (0, 0, 0)),
            pl.BlockSpec((3, columns), lambda n: (0, 0)),
            self.parts,
        ]
        self.settings: dict[str, Any] = {
            "grid": (pl.cdiv(tokens, TOKENS),),
            # All programs add to the gradients of the norms.
            "compiler_params": pl_tpu.CompilerParams(dimension_semantics=("arbitrary",)),
        }


class _Normed(NamedTuple):
    """Queries or keys of a head, `[K, tokens]`: standardized, 1 / deviation, and the result."""

    standard: jax.Array
    inverse: jax.Array
    result: jax.Array


class _Tile:
    """What both kernels do with the tokens of a program."""

    def __init__(
        self,
        seed_ref: Any,
        norms_ref: Any,
        bias_ref: Any,
        parts_ref: Any,
        *,
        length: int,
        width: int,
        tokens: int,
        total_heads: int,
        rate: float,
        causal: bool,
    ) -> None:
        self._seed_ref, self._norms_ref, self._bias_ref = seed_ref, norms_ref, bias_ref
        self._parts_ref = parts_ref
        self._length, self.width, self._rate = length, width, rate
        self._total_heads = total_heads
        self.dtype = parts_ref.dtype
        self.together = heads_together(width) * width
        self.kept_scale = 1 / (1 - rate)
        self._inside = None
        if tokens % TOKENS:  # The last program has fewer.
            token = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, 1), 0)
            self._inside = pl.program_id(0) * TOKENS + token < tokens
        key = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, TOKENS), 0)
        query = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, TOKENS), 1)
        self._seen = self._position(key) == self._position(query)
        if causal:
            self._seen &= key <= query

    def _position(self, token: jax.Array) -> jax.Array:
        """The number of a token's position; `TOKENS` is a multiple of the length, so of 2^n."""
        return token >> (self._length.bit_length() - 1)

    def groups(self) -> Iterator[tuple[slice, list[slice], int]]:
        """Columns of whole registers, the rows of their heads, and the first head's number."""
        for start in range(0, self._parts_ref.shape[2], self.together):
            rows = [slice(i, i + self.width) for i in range(0, self.together, self.width)]
            yield slice(start, start + self.together), rows, start // self.width

    def part(self, index: int, columns: slice) -> jax.Array:
        """Queries, keys or values with their bias, `[columns, tokens]`, in float32."""
        x = self.transposed(self._parts_ref[index, :, columns])
        bias = self._bias_ref[index : index + 1, columns].astype(jnp.float32)
        return x + jnp.broadcast_to(bias, (8, bias.shape[1])).T[:, :1]

    def transposed(self, x: jax.Array) -> jax.Array:
        """Tokens as lanes, in float32, 0 for those that do not exist."""
        x = x.astype(jnp.float32)
        return (x if self._inside is None else jnp.where(self._inside, x, 0.0)).T

    def norm(self, index: int, x: jax.Array) -> _Normed:
        """LayerNorm of a head's queries (index 0) or keys (1)."""
        centred = x - jnp.mean(x, axis=0, keepdims=True)
        variance = jnp.mean(centred * centred, axis=0, keepdims=True)
        inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
        standard = centred * inverse
        result = standard * self._norms_ref[2 * index] + self._norms_ref[2 * index + 1]
        return _Normed(standard, inverse, result.astype(self.dtype))

    def d_norm(self, index: int, normed: _Normed, d_result: jax.Array) -> jax.Array:
        """The gradient of what `norm` got."""
        d_standard = d_result * self._norms_ref[2 * index]
        along = jnp.mean(d_standard * normed.standard, axis=0, keepdims=True)
        mean = jnp.mean(d_standard, axis=0, keepdims=True)
        return normed.inverse * (d_standard - mean - normed.standard * along)

    def weights(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights `[keys, queries]` that are not yet divided by their sums, and the sums."""
        scores = jnp.where(self._seen, product(k, q, transpose_a=True), MASKED)
        largest = jnp.max(scores, axis=0, keepdims=True)
        weights = jnp.exp2((scores - largest) * (self.width**-0.5 * LOG2_E))
        return weights, jnp.sum(weights, axis=0, keepdims=True)

    def zero_dropped(self, head: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Dropout without `kept_scale`, of a head's weights and of their gradients."""
        if not self._rate:
            return arrays
        seed_ref, length = self._seed_ref, self._length
        query = jax.lax.broadcasted_iota(jnp.int32, (1, TOKENS), 1)
        key = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, 1), 0)
        first = pl.program_id(0) * (TOKENS // length) + seed_ref[2].astype(jnp.int32)
        position = first + self._position(query)
        row = position * self._total_heads + head + seed_ref[3].astype(jnp.int32)
        row = (row * length + (query & (length - 1))).astype(jnp.uint32)
        column = (key & (length - 1)).astype(jnp.uint32)
        kept = keep(seed_ref[0], seed_ref[1], row, column, self._rate)
        return tuple(jnp.where(kept, array, 0.0) for array in arrays)


def _forward_kernel(make_tile: Any, *refs: Any) -> None:
    *inputs, out_ref = refs
    tile = make_tile(*inputs)
    for columns, heads, first in tile.groups():
        q, k, v = (tile.part(index, columns) for index in range(3))
        outs = []
        for number, rows in enumerate(heads):
            weights, total = tile.weights(
                tile.norm(0, q[rows]).result, tile.norm(1, k[rows]).result
            )
            (weights,) = tile.zero_dropped(first + number, weights)
            out = product(v[rows].astype(tile.dtype), weights.astype(tile.dtype))
            outs.append(out * (tile.kept_scale / total))
        out_ref[:, columns] = jnp.concatenate(outs).T.astype(out_ref.dtype)


def _backward_kernel(make_tile: Any, *refs: Any) -> None:
    *inputs, d_out_ref, d_parts_ref, d_norms_ref = refs
    tile = make_tile(*inputs)

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        d_norms_ref[...] = jnp.zeros_like(d_norms_ref)

    for columns, heads, first in tile.groups():
        q, k, v = (tile.part(index, columns) for index in range(3))
        d_out = tile.transposed(d_out_ref[:, columns]).astype(tile.dtype)
        d_parts: tuple[list[jax.Array], ...] = ([], [], [])
        for number, rows in enumerate(heads):
            normed = tile.norm(0, q[rows]), tile.norm(1, k[rows])
            q_head, k_head = (x.result for x in normed)
            weights, total = tile.weights(q_head, k_head)
            weights = weights * (1 / total)
            d_weights = product(v[rows].astype(tile.dtype), d_out[rows], transpose_a=True)
            dropped, d_weights = tile.zero_dropped(first + number, weights, d_weights)
            d_scores = weights * d_weights
            # Softmax's gradient subtracts the weighted mean of the weights' gradients.
            mean = jnp.sum(d_scores, axis=0, keepdims=True)
            d_scores = (d_scores - weights * mean).astype(tile.dtype)
            scale = tile.width**-0.5 * tile.kept_scale
            d_q = product(k_head, d_scores) * scale
            d_k = product(q_head, d_scores, transpose_b=True) * scale
            d_v = product(d_out[rows], dropped.astype(tile.dtype), transpose_b=True)
            d_parts[2].append(d_v * tile.kept_scale)
            for index, (x, d_result) in enumerate(zip(normed, (d_q, d_k), strict=True)):
                d_norms_ref[2 * index] += d_result * x.standard
                d_norms_ref[2 * index + 1] += d_result
                d_parts[index].append(tile.d_norm(index, x, d_result))
        for index, parts in enumerate(d_parts):
            d_part = jnp.concatenate(parts).T
            d_parts_ref[index, :, columns] = d_part.astype(d_parts_ref.dtype)
