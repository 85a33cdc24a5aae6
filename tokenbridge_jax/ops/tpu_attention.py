"""The kernels of `attention.attend` for TPUs. All scores of a head stay in the core's memory.

A program takes a few heads of one image, as many as fill whole registers of 128 lanes: two of width
64. It computes scores as `[keys, queries]`. So softmax reduces over rows, which moves nothing
between lanes, and the numbers of a query are a row, which all keys share.

Heads are not cut out of the lanes either. In one factor of a product, the lanes of other heads are
zero. This is free, because a matrix unit sums over 128 or 256 lanes anyway.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from tokenbridge_jax.ops.dropout import keep
from tokenbridge_jax.ops.pallas import (
    HEADS_AXES,
    LOG2_E,
    MASKED,
    QKV_AXES,
    QUERY_AXES,
    on_shards,
    pl,
    pl_tpu,
    product,
)
from tokenbridge_jax.runtime.meshes import axis_size

LANES = 128

# The most tokens whose scores fit into the 16 MiB of memory that libtpu grants a kernel: seen to
# compile for v5e, v5p, v6e and tpu7x with heads of width 48 to 128 (640 fail with width 80).
MOST_TOKENS = 512


def takes(qkv: Float[Array, "N T 3 H K"]) -> bool:
    """Whether the kernels take these arrays: those of `fills_registers`, of not too many tokens."""
    return fills_registers(qkv) and qkv.shape[1] <= MOST_TOKENS


def fills_registers(qkv: Float[Array, "N T 3 H K"]) -> bool:
    """Whether the arrays are bfloat16, and the heads of a device fill whole registers."""
    heads, width = qkv.shape[3:]
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else axis_size(mesh, "tensor")
    local_heads = heads if heads % parts else heads // parts
    whole = width % 16 == 0 and local_heads % heads_together(width) == 0
    return qkv.dtype == jnp.bfloat16 and whole


def heads_together(width: int) -> int:
    """The number of heads that fill whole registers."""
    return LANES // math.gcd(LANES, width)


def forward(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    visible: Bool[Array, "#N T"] | None,
    seed: UInt32[Array, "2"],
    *,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "N T H K"], Float[Array, "N H T"]]:
    """The output of `attend`, and the log of every row's normalizer."""
    call = functools.partial(_call_forward, qkv.shape[3], rate, interpret)
    arrays, axes = _inputs(qkv, bias, visible)
    return on_shards(call, axes, (HEADS_AXES, QUERY_AXES), seed, *arrays)


def backward(
    qkv: Float[Array, "N T 3 H K"],
    bias: Float[Array, "3 H K"],
    visible: Bool[Array, "#N T"] | None,
    seed: UInt32[Array, "2"],
    normalizer: Float[Array, "N H T"],
    d_out: Float[Array, "N T H K"],
    *,
    rate: float,
    interpret: bool = False,
) -> Float[Array, "N T 3 H K"]:
    """The gradient of `attend` with respect to `qkv` (its sum over tokens is that of `bias`)."""
    call = functools.partial(_call_backward, qkv.shape[3], rate, interpret)
    arrays, axes = _inputs(qkv, bias, visible)
    axes = (QUERY_AXES, HEADS_AXES, *axes)
    return on_shards(call, axes, QKV_AXES, seed, normalizer, d_out, *arrays)


def _inputs(qkv: jax.Array, bias: jax.Array, visible: jax.Array | None) -> tuple[Any, Any]:
    """The arrays that both kernels read, and their logical axes."""
    if visible is None:
        return (bias, qkv), (QKV_AXES[2:], QKV_AXES)
    # Keys are rows of the scores, and a register's rows are an array's second-to-last axis.
    mask = visible[..., None].astype(jnp.float32)
    return (bias, qkv, mask), (QKV_AXES[2:], QKV_AXES, ("batch", None, None))


def _call_forward(
    heads: int, rate: float, interpret: bool, seed: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    blocks = _Blocks(*arrays)
    images, length, _, local_heads, width = arrays[1].shape
    tile = functools.partial(_Tile, heads=heads, width=width, rate=rate, masked=len(arrays) > 2)
    out, normalizer = pl.pallas_call(
        functools.partial(_forward_kernel, tile),
        in_specs=blocks.inputs,
        out_specs=[blocks.heads, blocks.normalizer],
        out_shape=[
            jax.ShapeDtypeStruct((images, length, local_heads * width), arrays[1].dtype),
            jax.ShapeDtypeStruct((images, local_heads, length), jnp.float32),
        ],
        interpret=interpret,
        **blocks.settings(products=2),
    )(seed, *blocks.flat)
    return out.reshape(images, length, local_heads, width), normalizer


def _call_backward(
    heads: int,
    rate: float,
    interpret: bool,
    seed: jax.Array,
    normalizer: jax.Array,
    d_out: jax.Array,
    *arrays: jax.Array,
) -> jax.Array:
    blocks = _Blocks(*arrays)
    images, length, _, _, width = arrays[1].shape
    tile = functools.partial(_Tile, heads=heads, width=width, rate=rate, masked=len(arrays) > 2)
    flat_d_out = d_out.reshape(images, length, -1)
    d_qkv = pl.pallas_call(
        functools.partial(_backward_kernel, tile),
        in_specs=[*blocks.inputs, blocks.normalizer, blocks.heads],
        out_specs=blocks.parts,
        out_shape=jax.ShapeDtypeStruct(blocks.flat[1].shape, arrays[1].dtype),
        interpret=interpret,
        **blocks.settings(products=5),
    )(seed, *blocks.flat, normalizer, flat_d_out)
    return d_qkv.swapaxes(1, 2).reshape(arrays[1].shape)


class _Blocks:
    """The arrays as the kernels read them, and the blocks of a program.

    Heads and width are one axis. Queries, keys and values are `[N, 3, T, H K]`: as the last two
    axes but one, the three would be padded to eight. XLA makes the product in this order.
    """

    def __init__(self, bias: jax.Array, qkv: jax.Array, mask: jax.Array | None = None) -> None:
        self.images, self.length, _, heads, self.width = qkv.shape
        self.flat = [
            bias.reshape(3, -1),
            qkv.reshape(*qkv.shape[:3], -1).swapaxes(1, 2),
            *([] if mask is None else [mask]),
        ]
        self.together = heads_together(self.width)
        self.programs = heads // self.together
        columns = self.together * self.width
        whole = (1, self.length)
        self.parts = pl.BlockSpec((1, 3, self.length, columns), lambda n, h: (n, 0, 0, h))
        self.heads = pl.BlockSpec((*whole, columns), lambda n, h: (n, 0, h))
        self.normalizer = pl.BlockSpec((1, heads, self.length), lambda n, h: (n, 0, 0))
        self.inputs = [
            pl.BlockSpec(memory_space=pl_tpu.SMEM),
            pl.BlockSpec((3, columns), lambda n, h: (0, h)),
            self.parts,
        ]
        if mask is not None:
            one_for_all = mask.shape[0] == 1
            place = (lambda n, h: (0, 0, 0)) if one_for_all else lambda n, h: (n, 0, 0)
            self.inputs.append(pl.BlockSpec((*whole, 1), place))

    def settings(self, products: int) -> dict[str, Any]:
        """Further arguments of `pl.pallas_call`, for a kernel of so many products with scores."""
        scores = self.images * self.programs * self.together * self.length**2
        qkv = self.flat[1]
        return {
            "grid": (self.images, self.programs),
            "compiler_params": pl_tpu.CompilerParams(
                # All programs of an image write the block of the normalizer.
                dimension_semantics=("parallel", "arbitrary")
            ),
            "cost_estimate": pl.CostEstimate(
                flops=2 * products * scores * self.width,
                transcendentals=scores,
                bytes_accessed=4 * products * qkv.size * qkv.dtype.itemsize // 6,
            ),
        }


class _Tile:
    """What both kernels do with the heads of a program."""

    def __init__(
        self,
        refs: list[Any],
        *,
        heads: int,
        width: int,
        rate: float,
        masked: bool,
    ) -> None:
        """`refs` are those of seed, bias, qkv, and of the mask if there is one."""
        self._seed_ref, self._bias_ref, self._qkv_ref = refs[:3]
        self._mask = refs[3][0] if masked else None
        self.length, self.columns = self._qkv_ref.shape[2:]
        self._heads, self.width, self._rate = heads, width, rate
        self.dtype = self._qkv_ref.dtype
        # Powers of two, and scores with the factor that makes them exponents of two.
        self.exponent = width**-0.5 * LOG2_E
        self.kept_scale = 1 / (1 - rate)

    def part(self, index: int) -> jax.Array:
        """Queries, keys or values with their bias, `[T, columns]`, in float32."""
        x = self._qkv_ref[0, index].astype(jnp.float32)
        return x + self._bias_ref[index : index + 1].astype(jnp.float32)

    def each_head(self) -> Iterator[tuple[int, slice, slice, jax.Array]]:
        """Every head's number, its columns, the registers that hold these, and which lanes do."""
        for head in range(self.columns // self.width):
            columns = slice(head * self.width, (head + 1) * self.width)
            registers = slice(columns.start // LANES * LANES, -(-columns.stop // LANES) * LANES)
            shape = (self.length, registers.stop - registers.start)
            lane = registers.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            yield head, columns, registers, (lane >= columns.start) & (lane < columns.stop)

    def scores(self, k: jax.Array, q: jax.Array) -> jax.Array:
        """Masked scores `[keys, queries]`, not scaled."""
        scores = product(k, q, transpose_b=True)
        return scores if self._mask is None else jnp.where(self._mask != 0, scores, MASKED)

    def zero_dropped(self, head: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Dropout without `kept_scale`, of a head's weights and of their gradients."""
        if not self._rate:
            return arrays
        seed_ref = self._seed_ref
        row = (pl.program_id(0) + seed_ref[2].astype(jnp.int32)) * self._heads
        together = self.columns // self.width
        row += pl.program_id(1) * together + head + seed_ref[3].astype(jnp.int32)
        query = jax.lax.broadcasted_iota(jnp.int32, (1, self.length), 1)
        key = jax.lax.broadcasted_iota(jnp.int32, (self.length, 1), 0)
        row = (row * self.length + query).astype(jnp.uint32)
        kept = keep(seed_ref[0], seed_ref[1], row, key.astype(jnp.uint32), self._rate)
        return tuple(jnp.where(kept, array, 0.0) for array in arrays)


def _forward_kernel(make_tile: Any, *refs: Any) -> None:
    *inputs, out_ref, normalizer_ref = refs
    tile = make_tile(inputs)
    q, k, v = map(tile.part, range(3))
    k, v_transposed = k.astype(tile.dtype), v.T.astype(tile.dtype)
    outs = []
    for head, columns, registers, mine in tile.each_head():
        q_head = jnp.where(mine, q[:, registers], 0.0).astype(tile.dtype)
        scores = tile.scores(k[:, registers], q_head)
        largest = jnp.max(scores, axis=0, keepdims=True)
        weights = jnp.exp2((scores - largest) * tile.exponent)
        total = jnp.sum(weights, axis=0, keepdims=True)
        (weights,) = tile.zero_dropped(head, weights)
        out = product(v_transposed[columns], weights.astype(tile.dtype))
        outs.append(out * (tile.kept_scale / total))
        row = pl.program_id(1) * (tile.columns // tile.width) + head
        normalizer_ref[0, pl.ds(row, 1)] = largest * tile.width**-0.5 + jnp.log(total)
    out_ref[0] = jnp.concatenate(outs).T.astype(out_ref.dtype)


def _backward_kernel(make_tile: Any, *refs: Any) -> None:
    *inputs, normalizer_ref, d_out_ref, d_qkv_ref = refs
    tile = make_tile(inputs)
    q, k, v = map(tile.part, range(3))
    d_out = d_out_ref[0].astype(jnp.float32)
    k_transposed, k, v = (x.astype(tile.dtype) for x in (k.T, k, v))
    d_qs = []
    d_k = d_v = jnp.zeros(q.shape, jnp.float32)
    for head, columns, registers, mine in tile.each_head():
        q_head, d_out_head = (
            jnp.where(mine, x[:, registers], 0.0).astype(tile.dtype) for x in (q, d_out)
        )
        row = pl.program_id(1) * (tile.columns // tile.width) + head
        normalizer = normalizer_ref[0, pl.ds(row, 1)] * LOG2_E
        scores = tile.scores(k[:, registers], q_head)
        weights = jnp.exp2(scores * tile.exponent - normalizer)
        d_weights = product(v[:, registers], d_out_head, transpose_b=True)
        dropped, d_weights = tile.zero_dropped(head, weights, d_weights)
        d_scores = weights * d_weights
        # Softmax's gradient subtracts from every row the weighted mean of the weights' gradients.
        mean = jnp.sum(d_scores, axis=0, keepdims=True)
        d_scores = (d_scores - weights * mean).astype(tile.dtype)
        d_qs.append(product(k_transposed[columns], d_scores))
        d_k = _add(d_k, registers, product(d_scores, q_head))
        d_v = _add(d_v, registers, product(dropped.astype(tile.dtype), d_out_head))
    scale = tile.width**-0.5 * tile.kept_scale
    d_q = jnp.concatenate(d_qs).T
    for part, (x, factor) in enumerate(((d_q, scale), (d_k, scale), (d_v, tile.kept_scale))):
        d_qkv_ref[0, part] = (x * factor).astype(d_qkv_ref.dtype)


def _add(total: jax.Array, registers: slice, x: jax.Array) -> jax.Array:
    """Adds to some columns of a sum."""
    parts = (total[:, : registers.start], total[:, registers] + x, total[:, registers.stop :])
    return jnp.concatenate([part for part in parts if part.shape[1]], axis=1)
