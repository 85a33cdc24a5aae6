"""Attention over the channels of a position, with normalized queries and keys.

A position's sequence is short (16 channels), and a batch has hundreds of thousands of them. As
plain operations, their many small products leave a GPU mostly idle, and every step between two
products is another pass over memory. The kernels pack whole sequences into one tile and mask its
product of queries and keys to the blocks on the diagonal. Other platforms run the plain version,
which is the definition. The kernels for TPUs are in `tpu_channel_attention`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from tokenbridge_jax.ops import tpu_channel_attention
from tokenbridge_jax.ops.attention import normed_heads, plain_attention
from tokenbridge_jax.ops.dropout import keep
from tokenbridge_jax.ops.norm import NORM_EPSILON
from tokenbridge_jax.ops.pallas import (
    HEADS_AXES,
    LOG2_E,
    MASKED,
    QKV_AXES,
    by_platform,
    gpu_call,
    has_kernel,
    on_shards,
    pl,
    pl_triton,
    product,
)

# The rows of a tile: few, because the gradients of a tile are kept in registers. Those that whole
# sequences do not fill are empty: two with six channels.
TILE = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_channels(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    norms: Float[Array, "4 K"],
    seed: UInt32[Array, "2"],
    rate: float,
    causal: bool,
) -> Float[Array, "N T H K"]:
    """softmax(norm(q) norm(k)^T / sqrt(K)) v with q, k, v = qkv + bias.

    Norms, scores and sums are float32.

    Args:
      qkv: queries, keys and values, without their bias.
      bias: of queries, keys and values, in the dtype of `qkv`.
      norms: float32 scale and bias of the queries' LayerNorm, then of the keys'.
      seed: of the dropout; see `dropout.seed_words`.
      rate: the probability that a weight is dropped.
      causal: whether a channel attends to those up to its own, or to all of its position.
    """
    return _forward(qkv, bias, norms, seed, rate, causal)[0]


def plain_channel_attention(
    qkv: jax.Array, bias: jax.Array, norms: jax.Array, seed: jax.Array, rate: float, causal: bool
) -> jax.Array:
    """`attend_channels` in plain operations."""
    q, k, v = normed_heads(qkv, bias, norms)
    visible = jnp.asarray(np.tri(q.shape[1], dtype=bool))[None] if causal else None
    return plain_attention(q, k, v, visible, seed, rate)


def _forward(
    qkv: jax.Array, bias: jax.Array, norms: jax.Array, seed: jax.Array, rate: float, causal: bool
) -> tuple[jax.Array, Any]:
    plain = functools.partial(plain_channel_attention, rate=rate, causal=causal)
    kernels = _kernels(qkv, rate, causal, kernel_forward, tpu_channel_attention.forward)
    arguments = (qkv, bias, norms, seed)
    return by_platform(plain, kernels, *arguments), arguments


def _backward(
    rate: float, causal: bool, residuals: Any, d_out: jax.Array
) -> tuple[Any, Any, Any, None]:
    qkv, bias = residuals[:2]

    def plain(*arguments: Any) -> Any:
        qkv, bias, norms, seed, d_out = arguments
        run = functools.partial(plain_channel_attention, seed=seed, rate=rate, causal=causal)
        return jax.vjp(lambda x, norms: run(x, bias, norms), qkv, norms)[1](d_out)

    kernels = _kernels(qkv, rate, causal, kernel_backward, tpu_channel_attention.backward)
    d_qkv, d_norms = by_platform(plain, kernels, *residuals, d_out)
    d_bias = jnp.sum(d_qkv, axis=(0, 1), dtype=jnp.float32).astype(bias.dtype)
    return d_qkv, d_bias, d_norms, None


attend_channels.defvjp(_forward, _backward)


def _kernels(qkv: jax.Array, rate: float, causal: bool, cuda: Any, tpu: Any) -> dict[str, Any]:
    """The kernels of these two that take the arrays, by platform."""
    takes = {"cuda": (cuda, _has_kernel(qkv)), "tpu": (tpu, tpu_channel_attention.takes(qkv))}
    return {
        name: functools.partial(kernel, rate=rate, causal=causal)
        for name, (kernel, ok) in takes.items()
        if ok
    }


def _has_kernel(qkv: jax.Array) -> bool:
    """Whether the kernel takes these arrays: a sequence must fit into a tile."""
    return has_kernel(qkv) and qkv.shape[1] <= TILE


def _tokens_of_tile(length: int) -> int:
    """How many tokens of whole sequences fit into a tile."""
    return TILE - TILE % length


def kernel_forward(
    qkv: jax.Array,
    bias: jax.Array,
    norms: jax.Array,
    seed: jax.Array,
    *,
    rate: float,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "N T H K"]:
    """`attend_channels` on a GPU."""
    total_heads = qkv.shape[3]

    def call(seed: jax.Array, norms: jax.Array, bias: jax.Array, qkv: jax.Array) -> jax.Array:
        count, length, _, heads, width = qkv.shape
        return gpu_call(
            functools.partial(
                _forward_kernel,
                length=length,
                heads=heads,
                width=width,
                total_heads=total_heads,
                rate=rate,
                causal=causal,
            ),
            grid=(pl.cdiv(count * length, _tokens_of_tile(length)), heads),
            out_shape=jax.ShapeDtypeStruct((count * length, heads * width), qkv.dtype),
            warps=4,
            interpret=interpret,
        )(seed, norms, bias.ravel(), qkv.reshape(count * length, -1)).reshape(
            count, length, heads, width
        )

    inputs = (_NORMS, QKV_AXES[2:], QKV_AXES)
    return on_shards(call, inputs, HEADS_AXES, seed, _pad(norms), bias, qkv)


def kernel_backward(
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
    total_heads = qkv.shape[3]

    def call(
        seed: jax.Array, norms: jax.Array, bias: jax.Array, qkv: jax.Array, d_out: jax.Array
    ) -> Any:
        count, length, _, heads, width = qkv.shape
        tiles = pl.cdiv(count * length, _tokens_of_tile(length))
        d_qkv, d_norms = gpu_call(
            functools.partial(
                _backward_kernel,
                length=length,
                heads=heads,
                width=width,
                total_heads=total_heads,
                rate=rate,
                causal=causal,
            ),
            grid=(tiles, heads),
            out_shape=(
                jax.ShapeDtypeStruct((count * length, 3 * heads * width), qkv.dtype),
                jax.ShapeDtypeStruct((tiles, heads, norms.size), jnp.float32),
            ),
            warps=4,
            interpret=interpret,
        )(seed, norms, bias.ravel(), *(x.reshape(count * length, -1) for x in (qkv, d_out)))
        return d_qkv.reshape(qkv.shape), d_norms

    outputs = (QKV_AXES, ("batch", "heads", None))
    d_qkv, d_norms = on_shards(
        call,
        (_NORMS, QKV_AXES[2:], QKV_AXES, HEADS_AXES),
        outputs,
        seed,
        _pad(norms),
        bias,
        qkv,
        d_out,
    )
    d_norms = jnp.sum(d_norms, axis=(0, 1)).reshape(4, -1)
    return d_qkv, d_norms[:, : norms.shape[1]]


_NORMS = (None, None)


def _pad(norms: Float[Array, "4 K"]) -> Float[Array, "4 columns"]:
    width = norms.shape[1]
    return jnp.pad(norms, ((0, 0), (0, pl.next_power_of_2(width) - width)))


class _Tile:
    """The attention of one head in one tile of whole sequences, and what its gradient needs."""

    def __init__(
        self,
        seed_ref: Any,
        norms_ref: Any,
        bias_ref: Any,
        qkv_ref: Any,
        length: int,
        heads: int,
        width: int,
        total_heads: int,
        rate: float,
        causal: bool,
    ):
        self.tile, self.head = pl.program_id(0), pl.program_id(1)
        self._heads, self.width, self._rate = heads, width, rate
        self._columns = norms_ref.shape[1]
        row, column = jnp.arange(TILE)[:, None], jnp.arange(TILE)[None]
        self._first = self.tile * _tokens_of_tile(length)
        is_token = (row < _tokens_of_tile(length)) & (self._first + row < qkv_ref.shape[0])
        self._inside = is_token & self.real_columns[None]
        self.norms = [norms_ref[pl.ds(i, 1), :] for i in range(4)]

        q, k, self.v = (
            self.load(qkv_ref, part) + self._load_bias(bias_ref, part) for part in range(3)
        )
        self.normal_q, self.scale_q = self._normalize(q)
        self.normal_k, self.scale_k = self._normalize(k)
        self.q = (self.normal_q * self.norms[0] + self.norms[1]).astype(q.dtype)
        self.k = (self.normal_k * self.norms[2] + self.norms[3]).astype(k.dtype)

        seen = row // length == column // length
        if causal:
            seen &= column <= row
        scores = product(self.q, self.k, transpose_b=True) * (self.width**-0.5 * LOG2_E)
        scores = jnp.where(seen, scores, MASKED)
        weights = jnp.exp2(scores - jnp.max(scores, axis=1, keepdims=True))
        self.weights = weights * (1 / jnp.sum(weights, axis=1, keepdims=True))

        sequence = (self._first + row) // length + seed_ref[2].astype(jnp.int32)
        sequence = sequence * total_heads + self.head + seed_ref[3].astype(jnp.int32)
        token = (sequence * length + row % length).astype(jnp.uint32)
        channel = (column % length).astype(jnp.uint32)
        self._kept = keep(seed_ref[0], seed_ref[1], token, channel, rate)

    @property
    def real_columns(self) -> jax.Array:
        return jnp.arange(self._columns) < self.width

    def drop(self, x: jax.Array) -> jax.Array:
        """Dropout of a `[TILE, TILE]` array, the same for weights and for their gradients."""
        return jnp.where(self._kept, x * (1 / (1 - self._rate)), 0.0)

    def load(self, ref: Any, part: int = 0) -> jax.Array:
        return pl_triton.load(ref.at[self._place(part)], mask=self._inside, other=0.0)

    def _load_bias(self, bias_ref: Any, part: int) -> jax.Array:
        place = bias_ref.at[self._place(part)[1]]
        return pl_triton.load(place, mask=self.real_columns, other=0.0)[None]

    def store(self, ref: Any, x: jax.Array, part: int = 0) -> None:
        pl_triton.store(ref.at[self._place(part)], x.astype(ref.dtype), mask=self._inside)

    def _place(self, part: int) -> tuple[Any, Any]:
        first = (part * self._heads + self.head) * self.width
        return pl.ds(self._first, TILE), pl.ds(first, self._columns)

    def _normalize(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows of mean 0 and variance 1, and the factor they were scaled by; 0 beyond K."""
        x = x.astype(jnp.float32)
        x = jnp.where(self.real_columns[None], x - self.mean(x), 0.0)
        scale = jax.lax.rsqrt(self.mean(x * x) + NORM_EPSILON)
        return x * scale, scale

    def mean(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=1, keepdims=True) / self.width


def _forward_kernel(
    seed_ref: Any, norms_ref: Any, bias_ref: Any, qkv_ref: Any, out_ref: Any, **settings: Any
) -> None:
    tile = _Tile(seed_ref, norms_ref, bias_ref, qkv_ref, **settings)
    tile.store(out_ref, product(tile.drop(tile.weights).astype(tile.v.dtype), tile.v))


def _backward_kernel(
    seed_ref: Any,
    norms_ref: Any,
    bias_ref: Any,
    qkv_ref: Any,
    d_out_ref: Any,
    d_qkv_ref: Any,
    d_norms_ref: Any,
    **settings: Any,
) -> None:
    tile = _Tile(seed_ref, norms_ref, bias_ref, qkv_ref, **settings)
    d_out = tile.load(d_out_ref)
    dropped = tile.drop(tile.weights).astype(d_out.dtype)
    tile.store(d_qkv_ref, product(dropped, d_out, transpose_a=True), 2)

    d_weights = tile.drop(product(d_out, tile.v, transpose_b=True))
    mean = jnp.sum(d_weights * tile.weights, axis=1, keepdims=True)
    d_scores = (tile.weights * (d_weights - mean) * tile.width**-0.5).astype(d_out.dtype)

    def through_norm(d_y: jax.Array, normal: jax.Array, scale: jax.Array, norm: int) -> None:
        """Writes the gradients of a tensor and of its norm, given that of the normalized tensor."""
        for i, d_norm in ((norm, d_y * normal), (norm + 1, d_y)):
            columns = tile.real_columns.shape[0]
            d_norms_ref[tile.tile, tile.head, pl.ds(i * columns, columns)] = jnp.sum(d_norm, axis=0)
        d_normal = d_y * tile.norms[norm]
        d_x = d_normal - tile.mean(d_normal) - normal * tile.mean(d_normal * normal)
        tile.store(d_qkv_ref, d_x * scale, norm // 2)

    through_norm(product(d_scores, tile.k), tile.normal_q, tile.scale_q, 0)
    through_norm(product(d_scores, tile.q, transpose_a=True), tile.normal_k, tile.scale_k, 2)
