"""Attention over a sequence, with dropout on its weights.

`attend` adds the bias of queries, keys and values, and computes attention. Its definition is
`plain_attention`, which all platforms can run; the backward pass runs it again. GPUs run two Pallas
kernels that never store a [T, T] array (the online softmax of FlashAttention, Dao et al. 2022; the
backward kernel computes the weights again), and so do TPUs (`tpu_attention`). On TPUs without
dropout, shapes that the kernels do not take are processed one image at a time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from tokenbridge_jax.ops import tpu_attention
from tokenbridge_jax.ops.dropout import drop, keep
from tokenbridge_jax.ops.norm import normalize
from tokenbridge_jax.ops.pallas import (
    HEADS_AXES,
    LOG2_E,
    MASKED,
    QKV_AXES,
    QUERY_AXES,
    by_platform,
    gpu_call,
    has_kernel,
    on_shards,
    pl,
    pl_triton,
    product,
)
from tokenbridge_jax.ops.precision import of_products

# The number of queries, and of keys, that a kernel for GPUs holds at a time.
BLOCK = 64

# `checkpoint_name` of what the backward pass needs of the forward pass, beside its input.
RESULT = "attention"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    visible: Bool[Array, "#N T"] | None,
    seed: UInt32[Array, "2"],
    rate: float,
) -> Float[Array, "N T H K"]:
    """softmax(q k^T / sqrt(K)) v with q, k, v = qkv + bias, with float32 scores and sums.

    Args:
      qkv: queries, keys and values, without their bias. Adding it here costs no pass over memory.
      bias: of queries, keys and values, in the dtype of `qkv`.
      visible: which tokens are attended to; None means all.
      seed: of the dropout; see `dropout.seed_words`.
      rate: the probability that a weight is dropped.
    """
    return _forward(qkv, bias, visible, seed, rate)[0]


def plain_attention(
    q: Float[Array, "N Q H K"],
    k: Float[Array, "N T H K"],
    v: Float[Array, "N T H K"],
    mask: Bool[Array, "#N #Q T"] | None,
    seed: UInt32[Array, "2"] | None = None,
    rate: float = 0.0,
) -> Float[Array, "N Q H K"]:
    """Attention in plain operations: all [N, H, Q, T] weights exist at once.

    There may be fewer queries than keys, and every query may have its own mask.
    """
    einsum = functools.partial(jnp.einsum, precision=of_products(q.dtype))
    scores = einsum("nqhk,nshk->nhqs", q, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED)
    weights = jax.nn.softmax(scores)
    if seed is not None:
        weights = drop(weights, seed, rate)
    return einsum("nhqs,nshk->nqhk", weights.astype(v.dtype), v)


def _plain(
    qkv: jax.Array, bias: jax.Array, visible: jax.Array | None, seed: jax.Array, *, rate: float
) -> jax.Array:
    q, k, v = _biased_heads(qkv, bias)
    return plain_attention(q, k, v, None if visible is None else visible[:, None], seed, rate)


def image_by_image(
    qkv: jax.Array, bias: jax.Array, visible: jax.Array | None, seed: jax.Array
) -> jax.Array:
    """`attend` without dropout, one image at a time on every device.

    The scores of one image fit into a TPU's fast memory (VMEM); those of a whole batch do not.
    """

    def call(seed: jax.Array, visible: jax.Array, bias: jax.Array, qkv: jax.Array) -> jax.Array:
        def on_image(image: tuple[jax.Array, jax.Array]) -> jax.Array:
            visible, qkv = image
            return _plain(qkv[None], bias, visible[None], seed[:2], rate=0.0)[0]

        return jax.lax.map(on_image, (jnp.broadcast_to(visible, qkv.shape[:2]) != 0, qkv))

    inputs = (_ROWS, QKV_AXES[2:], QKV_AXES)
    return on_shards(call, inputs, HEADS_AXES, seed, _all_visible(visible, qkv), bias, qkv)


def split_heads(qkv: Float[Array, "N T 3 H K"]) -> list[Float[Array, "N T H K"]]:
    """Queries, keys and values."""
    # Split, not indexed: the gradient is one concatenation, not a sum of three padded arrays.
    return [part[:, :, 0] for part in jnp.split(qkv, 3, axis=2)]


def _biased_heads(qkv: jax.Array, bias: jax.Array) -> list[jax.Array]:
    return [part + bias[None, None, i] for i, part in enumerate(split_heads(qkv))]


def normed_heads(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    norms: Sequence[jax.Array] | Float[Array, "4 K"],
) -> tuple[Float[Array, "N T H K"], ...]:
    """Queries, keys and values of qkv + bias, with LayerNorm on queries and keys.

    `norms` are the scale and the bias of the queries' norm, then those of the keys'.
    """
    q, k, v = _biased_heads(qkv, bias)
    q = normalize(q, norms[0], norms[1]).astype(v.dtype)
    k = normalize(k, norms[2], norms[3]).astype(v.dtype)
    return q, k, v


def _forward(
    qkv: jax.Array, bias: jax.Array, visible: jax.Array | None, seed: jax.Array, rate: float
) -> tuple[jax.Array, Any]:
    batch, length, _, heads, _ = qkv.shape
    # Only the backward kernels need the log of every row's normalizer.
    no_normalizer = jnp.zeros((batch, heads, length))

    def plain(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        return _plain(*arguments, rate=rate), no_normalizer

    def one_by_one(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        return image_by_image(*arguments), no_normalizer

    arguments = (qkv, bias, visible, seed)
    others = {} if rate else {"tpu": one_by_one}
    kernels: dict[str, Any] = {}
    if has_kernel(qkv):
        kernels["cuda"] = functools.partial(kernel_forward, rate=rate)
    if tpu_attention.takes(qkv):
        kernels["tpu"] = functools.partial(tpu_attention.forward, rate=rate)
    results = by_platform(plain, kernels, *arguments, **others)
    out, normalizer = (checkpoint_name(result, RESULT) for result in results)
    return out, (*arguments, out, normalizer)


def _backward(rate: float, residuals: Any, d_out: jax.Array) -> tuple[Any, Any, None, None]:
    qkv, bias = residuals[:2]

    def plain(*arguments: Any) -> jax.Array:
        qkv, *others, _, _, d_out = arguments
        return jax.vjp(lambda x: _plain(x, *others, rate=rate), qkv)[1](d_out)[0]

    def tpu(*arguments: Any) -> jax.Array:
        qkv, bias, visible, seed, _, normalizer, d_out = arguments
        return tpu_attention.backward(qkv, bias, visible, seed, normalizer, d_out, rate=rate)

    kernels = {"tpu": tpu} if tpu_attention.takes(qkv) else {}
    if has_kernel(qkv):
        kernels["cuda"] = functools.partial(kernel_backward, rate=rate)
    d_qkv = by_platform(plain, kernels, *residuals, d_out)
    d_bias = jnp.sum(d_qkv, axis=(0, 1), dtype=jnp.float32).astype(bias.dtype)
    return d_qkv, d_bias, None, None


attend.defvjp(_forward, _backward)


def kernel_forward(
    qkv: jax.Array,
    bias: jax.Array,
    visible: jax.Array | None,
    seed: jax.Array,
    *,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "N T H K"], Float[Array, "N H T"]]:
    """The output of `attend` and the log of every row's normalizer, on a GPU."""
    kernel = functools.partial(_forward_kernel, width=qkv.shape[4], heads=qkv.shape[3], rate=rate)

    def call(seed: jax.Array, visible: jax.Array, bias: jax.Array, qkv: jax.Array) -> Any:
        batch, length, _, heads, width = qkv.shape
        shapes = (
            jax.ShapeDtypeStruct((batch, length, heads * width), qkv.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        )
        grid = (batch, pl.cdiv(length, BLOCK), heads)
        run = gpu_call(
            kernel,
            grid=grid,
            out_shape=shapes,
            warps=4,
            stages=2 if rate else 3,  # What is faster on an H200.
            interpret=interpret,
        )
        out, normalizer = run(seed, visible, bias.ravel(), qkv.reshape(batch, length, -1))
        return out.reshape(batch, length, heads, width), normalizer

    outputs = (HEADS_AXES, QUERY_AXES)
    inputs = (_ROWS, QKV_AXES[2:], QKV_AXES)
    return on_shards(call, inputs, outputs, seed, _all_visible(visible, qkv), bias, qkv)


def kernel_backward(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    visible: Bool[Array, "#N T"] | None,
    seed: UInt32[Array, "2"],
    out: Float[Array, "N T H K"],
    normalizer: Float[Array, "N H T"],
    d_out: Float[Array, "N T H K"],
    *,
    rate: float,
    interpret: bool = False,
) -> Float[Array, "N T 3 H K"]:
    """The gradient of `attend` with respect to `qkv` (its sum over tokens is that of `bias`)."""
    kernel = functools.partial(_backward_kernel, width=qkv.shape[4], heads=qkv.shape[3], rate=rate)

    def call(*arrays: jax.Array) -> Any:
        seed, visible, bias, qkv, normalizer, mean, d_out = arrays
        batch, length, _, heads, _ = qkv.shape
        shape = jax.ShapeDtypeStruct((batch, length, qkv[0, 0].size), qkv.dtype)
        grid = (batch, pl.cdiv(length, BLOCK), heads)
        run = gpu_call(kernel, grid=grid, out_shape=shape, warps=4, stages=3, interpret=interpret)
        flat_qkv, flat_d_out = (x.reshape(batch, length, -1) for x in (qkv, d_out))
        d_qkv = run(seed, visible, bias.ravel(), flat_qkv, normalizer, mean, flat_d_out)
        return d_qkv.reshape(qkv.shape)

    # Softmax's gradient subtracts from every row the weighted mean of the weights' gradients.
    mean = jnp.einsum("nthk,nthk->nht", out, d_out, preferred_element_type=jnp.float32)
    inputs = (_ROWS, QKV_AXES[2:], QKV_AXES, QUERY_AXES, QUERY_AXES, HEADS_AXES)
    return on_shards(
        call, inputs, QKV_AXES, seed, _all_visible(visible, qkv), bias, qkv, normalizer, mean, d_out
    )


_ROWS = ("batch", None)


def _all_visible(visible: jax.Array | None, qkv: jax.Array) -> Int[Array, "#N T"]:
    return jnp.ones((1, qkv.shape[1]), jnp.int32) if visible is None else visible.astype(jnp.int32)


class _Tile:
    """A program's place in the arrays; it reads and writes tiles `[BLOCK, columns]` of one head.

    In the arrays, parts (q, k and v), heads and width are one axis. Tiles have powers of two of
    columns: rows beyond T and columns beyond K are read as 0 and not written.
    """

    def __init__(self, refs: tuple[Any, ...], *, width: int, heads: int, rate: float):
        """`refs` are those of seed, visible, bias, qkv and normalizer."""
        self._seed_ref, self._visible_ref, self._bias_ref, self._qkv_ref, normalizer_ref = refs
        self.row, self.head = pl.program_id(0), pl.program_id(2)
        self._local_heads, self.length = normalizer_ref.shape[1:]
        self.width, self.columns = width, pl.next_power_of_2(width)
        self._heads, self._rate = heads, rate

    def load(self, ref: Any, block: jax.Array, part: int = 0) -> jax.Array:
        place, inside = self._place(block, part)
        return pl_triton.load(ref.at[place], mask=inside, other=0.0)

    def load_part(self, block: jax.Array, part: int) -> jax.Array:
        """Queries, keys or values with their bias."""
        columns = self._place(block, part)[0][-1]
        exists = jnp.arange(self.columns) < self.width
        bias = pl_triton.load(self._bias_ref.at[columns], mask=exists, other=0.0)
        return self.load(self._qkv_ref, block, part) + bias[None]

    def store(self, ref: Any, x: jax.Array, block: jax.Array, part: int = 0) -> None:
        place, inside = self._place(block, part)
        pl_triton.store(ref.at[place], x.astype(ref.dtype), mask=inside)

    def _place(self, block: jax.Array, part: int) -> tuple[Any, jax.Array]:
        first = (part * self._local_heads + self.head) * self.width
        inside = self.rows(block)[1][:, None] & (jnp.arange(self.columns) < self.width)[None]
        return (self.row, self.rows(block)[0], pl.ds(first, self.columns)), inside

    def rows(self, block: jax.Array) -> tuple[Any, jax.Array]:
        """The rows of a block, and which of them exist."""
        return pl.ds(block * BLOCK, BLOCK), block * BLOCK + jnp.arange(BLOCK) < self.length

    def load_rows(self, ref: Any, block: jax.Array, beyond: float) -> jax.Array:
        """One number per row of a block, from `[N, H, T]`; `beyond` for rows beyond T."""
        rows, inside = self.rows(block)
        return pl_triton.load(ref.at[self.row, self.head, rows], mask=inside, other=beyond)

    def scores(self, q: jax.Array, k: jax.Array, block: jax.Array) -> jax.Array:
        """Masked scores `[BLOCK, BLOCK]` of queries and a block of keys, for powers of two."""
        rows, inside = self.rows(block)
        row = jnp.minimum(self.row, self._visible_ref.shape[0] - 1)
        visible = pl_triton.load(self._visible_ref.at[row, rows], mask=inside, other=0)
        scores = product(q, k, transpose_b=True) * (self.width**-0.5 * LOG2_E)
        return jnp.where((visible != 0)[None], scores, MASKED)

    @property
    def kept_scale(self) -> float:
        """The factor of what dropout keeps; kernels apply it to their smallest arrays."""
        return 1 / (1 - self._rate)

    def zero_dropped(self, x: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Dropout without `kept_scale`, of two blocks' weights or of their gradients."""
        if not self._rate:
            return x
        seed_ref = self._seed_ref
        row = (self.row + seed_ref[2].astype(jnp.int32)) * self._heads
        row = (row + self.head + seed_ref[3].astype(jnp.int32)) * self.length
        q = (row + queries * BLOCK + jnp.arange(x.shape[0])).astype(jnp.uint32)
        k = (keys * BLOCK + jnp.arange(x.shape[1])).astype(jnp.uint32)
        kept = keep(seed_ref[0], seed_ref[1], q[:, None], k[None], self._rate)
        return jnp.where(kept, x, 0.0)


def _forward_kernel(
    seed_ref: Any,
    visible_ref: Any,
    bias_ref: Any,
    qkv_ref: Any,
    out_ref: Any,
    normalizer_ref: Any,
    **settings: Any,
) -> None:
    """One block of queries against all keys."""
    tile = _Tile((seed_ref, visible_ref, bias_ref, qkv_ref, normalizer_ref), **settings)
    mine = pl.program_id(1)
    q = tile.load_part(mine, 0)

    def attend(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out = carry
        k, v = tile.load_part(block, 1), tile.load_part(block, 2)
        scores = tile.scores(q, k, block)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        shrink = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores - new_largest[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        weights = tile.zero_dropped(weights, mine, block).astype(v.dtype)
        return new_largest, total, out * shrink[:, None] + product(weights, v)

    zeros = jnp.zeros(BLOCK, jnp.float32)
    start = (zeros + MASKED, zeros, jnp.zeros((BLOCK, tile.columns), jnp.float32))
    largest, total, out = jax.lax.fori_loop(0, pl.cdiv(tile.length, BLOCK), attend, start)
    tile.store(out_ref, out * (tile.kept_scale / total)[:, None], mine)
    rows, inside = tile.rows(mine)
    place = normalizer_ref.at[tile.row, tile.head, rows]
    pl_triton.store(place, largest / LOG2_E + jnp.log(total), mask=inside)


def _backward_kernel(
    seed_ref: Any,
    visible_ref: Any,
    bias_ref: Any,
    qkv_ref: Any,
    normalizer_ref: Any,
    mean_ref: Any,
    d_out_ref: Any,
    d_qkv_ref: Any,
    **settings: Any,
) -> None:
    """The gradients of one block of queries, then of the same block of keys and values."""
    tile = _Tile((seed_ref, visible_ref, bias_ref, qkv_ref, normalizer_ref), **settings)
    mine, blocks = pl.program_id(1), pl.cdiv(tile.length, BLOCK)
    scale = tile.width**-0.5 * tile.kept_scale
    q, k, v = (tile.load_part(mine, part) for part in range(3))
    d_out = tile.load(d_out_ref, mine)
    zeros = jnp.zeros((BLOCK, tile.columns), jnp.float32)

    def gradients(
        q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, queries: Any, keys: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The dropped weights of two blocks, and the gradient of their scores, both unscaled."""
        # Rows beyond T contain a bias; a huge normalizer makes their weights 0.
        normalizer = tile.load_rows(normalizer_ref, queries, -MASKED)[:, None]
        mean = tile.load_rows(mean_ref, queries, 0.0)[:, None] / tile.kept_scale
        weights = jnp.exp2(tile.scores(q, k, keys) - normalizer * LOG2_E)
        d_weights = tile.zero_dropped(product(d_out, v, transpose_b=True), queries, keys)
        d_scores = weights * (d_weights - mean)
        dropped = tile.zero_dropped(weights, queries, keys)
        return dropped.astype(v.dtype), d_scores.astype(q.dtype)

    def over_keys(block: jax.Array, d_q: jax.Array) -> jax.Array:
        k, v = tile.load_part(block, 1), tile.load_part(block, 2)
        _, d_scores = gradients(q, k, v, d_out, mine, block)
        return d_q + product(d_scores, k)

    tile.store(d_qkv_ref, jax.lax.fori_loop(0, blocks, over_keys, zeros) * scale, mine, 0)

    def over_queries(
        block: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        q, d_out = tile.load_part(block, 0), tile.load(d_out_ref, block)
        dropped, d_scores = gradients(q, k, v, d_out, block, mine)
        d_k = carry[0] + product(d_scores, q, transpose_a=True)
        return d_k, carry[1] + product(dropped, d_out, transpose_a=True)

    d_k, d_v = jax.lax.fori_loop(0, blocks, over_queries, (zeros, zeros))
    tile.store(d_qkv_ref, d_k * scale, mine, 1)
    tile.store(d_qkv_ref, d_v * tile.kept_scale, mine, 2)
