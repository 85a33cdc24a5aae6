"""Transformer blocks: of the backbone (over positions) and of the head (over channels).

Every layer here is an ordinary one. Where an operation of `ops/` includes a layer's bias or norm,
because that saves passes over memory on GPUs, it is given the layer's `terms` or `weights`.

A block is called as `block(x, shared)` and returns `(x, None)`, so that `stack_layers` can scan
over depth. Dropout is on if and only if `apply` gets a "dropout" key, which only training gives.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from tokenbridge_jax.layers import Dense, Layer, LayerNorm, add_bias, linear_product
from tokenbridge_jax.ops.attention import RESULT, attend, plain_attention, split_heads
from tokenbridge_jax.ops.cached_attention import Cache, attend_cached
from tokenbridge_jax.ops.channel_attention import attend_channels
from tokenbridge_jax.ops.dropout import drop, seed_words
from tokenbridge_jax.ops.gelu import gelu_dropout
from tokenbridge_jax.runtime.meshes import named_axes

# What the backward pass keeps of a block's forward pass; it computes the rest again. `None` keeps
# everything.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESULT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}

embedding_init = nn.initializers.normal(0.02)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """The affine step of adaptive normalisation."""
    return x * (1 + scale) + shift


class Modulation(Layer):
    """Shifts, scales and gates from a condition, all by one linear layer that starts at zero.

    They are side by side, for `jnp.split`, whose gradient is one concatenation. A separate axis
    would cost copies on TPUs, where tiles span an array's last two axes.
    """

    parts: int
    dtype: Any = jnp.float32
    float8: bool = False

    @nn.compact
    def __call__(self, condition: Float[Array, "*N D"]) -> Float[Array, "*N {self.parts}*D"]:
        width, zeros = condition.shape[-1], nn.initializers.zeros
        init = named_axes(zeros, "embed", None, None)
        kernel = self.param("kernel", init, (width, self.parts, width)).astype(self.dtype)
        bias = self.param("bias", zeros, (self.parts, width))
        product = linear_product(condition, kernel.reshape(width, -1), 1, self.float8)
        return add_bias(product, bias.ravel())


def block_flops(tokens: Any, attended: Any, width: int, modulation: int = 0) -> Any:
    """Matmul FLOPs of a block, forward, with so many parts of a modulation of every token."""
    linear = 2 * tokens * width * width * (4 + 8 + modulation)
    return linear + 4 * tokens * attended * width


@flax.struct.dataclass
class Window:
    """`size` neighbouring places of a sequence, from a traced `start` on."""

    start: Int[Array, ""]
    size: int = flax.struct.field(pytree_node=False)

    def cut(self, x: jax.Array) -> jax.Array:
        """The places of the window: `[N, T, ...]` -> `[N, size, ...]`."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=1)


class Dropout(nn.Module):
    """Dropout that is on if and only if `apply` got a "dropout" key."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return drop(x, *dropout_seed(self, self.rate))


def dropout_seed(module: nn.Module, rate: float) -> tuple[UInt32[Array, "2"], float]:
    """A fresh seed for one use of dropout, and its rate: 0 without a "dropout" key."""
    if not rate or not module.has_rng("dropout"):
        return jnp.zeros(2, jnp.uint32), 0.0
    return seed_words(module.make_rng("dropout")), rate


def qkv_layer(width: int, heads: int, dtype: Any, float8: bool) -> Dense:
    """Queries, keys and values of all heads: `[N, T, D]` -> `[N, T, 3, H, K]`."""
    axes = ("embed", "qkv", "heads", "head_width")
    return Dense((3, heads, width // heads), axes, dtype, joined=True, float8=float8, name="qkv")


def output_layer(width: int, dtype: Any, float8: bool) -> Dense:
    """Joins the heads' results: `[N, T, H, K]` -> `[N, T, D]`."""
    axes = ("heads", "head_width", "embed")
    return Dense((width,), axes, dtype, joined=True, float8=float8, name="proj")


class Attention(nn.Module):
    """Multi-head self-attention of the backbone, scale 1/sqrt(K), softmax in float32.

    With a `window`, only its places have queries; all places have keys and values. That is for
    sampling, so no attention weight is dropped.
    """

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    float8: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        visible: Bool[Array, "#N T"] | None = None,
        window: Window | None = None,
    ) -> Float[Array, "N W D"]:
        width = x.shape[-1]
        qkv = qkv_layer(width, self.heads, self.dtype, self.float8)
        if window is None:
            x = attend(*qkv.terms(x), visible, *dropout_seed(self, self.dropout))
        else:
            q, k, v = split_heads(qkv(x))
            x = plain_attention(window.cut(q), k, v, None if visible is None else visible[:, None])
        return Dropout(self.dropout)(output_layer(width, self.dtype, self.float8)(x))


class ChannelAttention(nn.Module):
    """Multi-head self-attention of the head, with LayerNorm on queries and keys.

    A causal one sees the places up to its own, the other one all. With a `cache`, x is one place,
    which attends to the cached places and itself.
    """

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    causal: bool = True
    float8: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"], cache: Cache | None = None
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        width = x.shape[-1]
        layer = qkv_layer(width, self.heads, self.dtype, self.float8)
        q_norm, k_norm = LayerNorm(name="q_norm"), LayerNorm(name="k_norm")
        seed = dropout_seed(self, self.dropout)
        qkv, bias = layer.terms(x)
        norms = (*q_norm.weights(width // self.heads), *k_norm.weights(width // self.heads))
        if cache is None:
            x = attend_channels(qkv, bias, jnp.stack(norms), *seed, self.causal)
        else:
            x, cache = attend_cached(qkv, bias, norms, cache)
        return Dropout(self.dropout)(output_layer(width, self.dtype, self.float8)(x)), cache


class Mlp(nn.Module):
    """Linear to 4D, exact GELU, linear back, with dropout after GELU and at the end."""

    dropout: float = 0.0
    dtype: Any = jnp.float32
    float8: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        width = x.shape[-1]
        fc1 = Dense((4 * width,), ("embed", "mlp"), self.dtype, float8=self.float8, name="fc1")
        fc2 = Dense((width,), ("mlp", "embed"), self.dtype, float8=self.float8, name="fc2")
        x = gelu_dropout(*fc1.terms(x), *dropout_seed(self, self.dropout))
        return Dropout(self.dropout)(fc2(x))


class Block(nn.Module):
    """Pre-norm block of the backbone."""

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    float8: bool = False

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.dtype)
        self.attn = Attention(self.heads, self.dropout, self.dtype, self.float8)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.dropout, self.dtype, self.float8)

    def __call__(
        self,
        x: Float[Array, "N T D"],
        visible: Bool[Array, "#N T"] | None = None,
        window: Window | None = None,
    ) -> tuple[Float[Array, "N W D"], None]:
        """Runs the block; with a `window`, for its places only, which attend to all places."""
        y = self.attn(self.norm1(x), visible, window)
        x = y + (x if window is None else window.cut(x))
        return x + self.mlp(self.norm2(x)), None


class ConditionedBlock(nn.Module):
    """Block whose norms are modulated and whose branches are gated by a condition (AdaLN-Zero)."""

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    causal: bool = True
    float8: bool = False

    def setup(self) -> None:
        self.modulation = Modulation(6, self.dtype, self.float8)
        self.norm1 = LayerNorm(self.dtype)
        self.attn = ChannelAttention(self.heads, self.dropout, self.dtype, self.causal, self.float8)
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(self.dropout, self.dtype, self.float8)

    def __call__(
        self, x: Float[Array, "N T D"], condition: Float[Array, "N T D"]
    ) -> tuple[Float[Array, "N T D"], None]:
        """Runs the block; `condition` is after its SiLU."""
        return self.modulated(x, self.modulation(condition))[0], None

    def modulated(
        self,
        x: Float[Array, "N T D"],
        modulation: Float[Array, "N T 6*D"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        """The block, given the modulation of its condition."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        y, cache = self.attn(modulate(self.norm1(x), shift1, scale1), cache)
        x = x + gate1 * y
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2)), cache


class Unrolled(nn.Module):
    """Blocks one after another, each with its own parameters (see `unstack`).

    The program contains every block, so it compiles more slowly than a scan. It runs faster,
    because nothing is sliced from stacked parameters or written into stacked residuals, and single
    blocks can be called.
    """

    make_block: Callable[[], nn.Module]
    layers: int

    def setup(self) -> None:
        self.blocks = [self.make_block() for _ in range(self.layers)]

    def __call__(
        self, x: Float[Array, "N T D"], shared: Any, window: Window | None = None
    ) -> tuple[jax.Array, None]:
        """Runs all blocks; with a `window`, the last one for its places only."""
        for block in self.blocks[:-1]:
            x, _ = block(x, shared)
        last = self.blocks[-1]
        return last(x, shared) if window is None else last(x, shared, window)


class LastApart(nn.Module):
    """A scan over all blocks but the last one (see `set_last_apart`).

    Its program is small, and yet the last block can run for a window.
    """

    make_scan: Callable[[], nn.Module] | None
    make_block: Callable[[], nn.Module]

    def setup(self) -> None:
        self.first = self.make_scan() if self.make_scan else None
        self.last = self.make_block()

    def __call__(
        self, x: Float[Array, "N T D"], shared: Any, window: Window | None = None
    ) -> tuple[jax.Array, None]:
        """Runs all blocks; with a `window`, the last one for its places only."""
        if self.first is not None:
            x, _ = self.first(x, shared)
        return self.last(x, shared, window)


def set_last_apart(stacked: dict[str, Any]) -> dict[str, Any]:
    """Turns the parameters of stacked layers into those of `LastApart`."""
    return {
        "first": jax.tree.map(lambda leaf: leaf[:-1], stacked),
        "last": jax.tree.map(lambda leaf: leaf[-1], stacked),
    }


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Turns the parameters of stacked layers, anywhere in the tree, into those of `Unrolled`."""
    return {
        name: {f"blocks_{i}": layer for i, layer in enumerate(_layers(value))}
        if name.endswith("blocks")
        else unstack(value)
        if isinstance(value, dict)
        else value
        for name, value in params.items()
    }


def _layers(stacked: dict[str, Any]) -> list[dict[str, Any]]:
    leaves, structure = jax.tree.flatten(stacked)
    layers = zip(*map(jnp.unstack, leaves), strict=True)
    return [jax.tree.unflatten(structure, layer) for layer in layers]


@functools.cache
def _jitted(block: Any, remat: str) -> Any:
    """A block that is traced and lowered once for all layers and stages with the same shapes.

    The compiler puts the calls into one program again: only the time before it falls.
    """
    methods = [name for name in ("__call__", "modulated") if hasattr(block, name)]
    return nn.jit(_with_remat(block, remat), methods=methods)


def _with_remat(block: type[nn.Module], remat: str, prevent_cse: bool = True) -> Any:
    policy = REMAT_POLICIES[remat]
    if policy is None:
        return block
    return nn.remat(block, prevent_cse=prevent_cse, policy=policy)


def stack_layers(
    block: type[nn.Module],
    layers: int,
    remat: str = "none",
    scan_layers: bool = True,
    unroll: int = 1,
) -> Callable[..., Any]:
    """Makes a block's class over depth: `(x, shared) -> (x, None)`, one `shared` for all layers.

    Args:
      block: the class of one layer.
      layers: how many.
      remat: a key of `REMAT_POLICIES`.
      scan_layers: whether to scan one block, whose program does not grow with the depth and whose
        parameters have a leading axis of size `layers`; or to make an `Unrolled`.
      unroll: layers that one step of the scan contains.
    """
    if not scan_layers:
        made = _jitted(cast(Any, block), remat)
        return lambda *arguments: Unrolled(functools.partial(made, *arguments), layers)
    return nn.scan(
        # A scan's backward pass cannot be merged with its forward pass: it needs no barrier.
        _with_remat(block, remat, prevent_cse=False),
        length=layers,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
