"""Transformer blocks: of the backbone (over positions) and of the head (over channels).

A block is called as `block(x, shared)` and returns `(x, None)`, so that `stack_layers` can scan
either over depth. Dropout acts exactly when a "dropout" key is given to `apply`: training gives
one, nothing else does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from tokenbridge_jax.layers import Dense, add_bias, xavier
from tokenbridge_jax.ops.attention import attention, plain_attention, split_heads
from tokenbridge_jax.ops.cached_attention import cached_attention
from tokenbridge_jax.ops.channel_attention import channel_attention
from tokenbridge_jax.ops.dropout import dropout, seed_words
from tokenbridge_jax.ops.gelu import gelu_dropout
from tokenbridge_jax.ops.pallas import NORM_EPSILON
from tokenbridge_jax.ops.precision import of_products
from tokenbridge_jax.runtime.meshes import named_axes

# What the backward pass keeps of a block's forward pass; the rest it computes again. `None` keeps
# everything.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

embedding_init = nn.initializers.normal(0.02)


def layer_norm(dtype: Any, affine: bool = True, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis with float32 statistics.

    In two passes: E[x^2] - E[x]^2 loses all digits where the mean is far above the deviation.
    """
    return nn.LayerNorm(
        epsilon=NORM_EPSILON,
        dtype=dtype,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        name=name,
    )


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive normalisation's affine step."""
    return x * (1 + scale) + shift


class Modulation(nn.Module):
    """Shifts, scales and gates of a condition, all from one product.

    They come side by side, for `jnp.split`, whose gradient is one concatenation. An axis of parts
    would cost copies on TPUs, whose tiles span an array's last two axes.
    """

    parts: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, condition: Float[Array, "*N D"]) -> Float[Array, "*N {self.parts}*D"]:
        width, zeros = condition.shape[-1], nn.initializers.zeros
        init = named_axes(zeros, "embed", None, None)
        kernel = self.param("kernel", init, (width, self.parts, width)).astype(self.dtype)
        bias = self.param("bias", zeros, (self.parts, width))
        product = jnp.matmul(
            condition, kernel.reshape(width, -1), precision=of_products(self.dtype)
        )
        return add_bias(product, bias.ravel())


class Cache(NamedTuple):
    """Keys and values of the places already seen, and the place being computed."""

    keys: Float[Array, "N H T K"]
    values: Float[Array, "N H T K"]
    place: Int[Array, ""]


class Window(NamedTuple):
    """`size` neighbouring places of a sequence from a traced `start` on."""

    start: Int[Array, ""]
    size: int

    def cut(self, x: jax.Array) -> jax.Array:
        """The places of the window: `[N, T, ...]` -> `[N, size, ...]`."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=1)


class Dropout(nn.Module):
    """Dropout that is on exactly when the caller of `apply` gave a "dropout" key."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dropout(x, *dropout_seed(self, self.rate))


def dropout_seed(module: nn.Module, rate: float) -> tuple[UInt32[Array, "2"], float]:
    """A fresh seed for one use of dropout and its rate; the rate is 0 without a "dropout" key."""
    if not rate or not module.has_rng("dropout"):
        return jnp.zeros(2, jnp.uint32), 0.0
    return seed_words(module.make_rng("dropout")), rate


class QKV(nn.Module):
    """Queries, keys and values of all heads in one product, and their bias, not yet added."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"]
    ) -> tuple[Float[Array, "N T 3 H K"], Float[Array, "3 H K"]]:
        width = x.shape[-1]
        shape = (3, self.heads, width // self.heads)

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return xavier(key, (width, 3 * width)).reshape(shape)

        axes = ("embed", "qkv", "heads", "head_width")
        kernel = self.param("kernel", named_axes(init, *axes), (width, *shape))
        bias = self.param("bias", named_axes(nn.initializers.zeros, *axes[1:]), shape)
        kernel = kernel.astype(self.dtype)
        precision = of_products(self.dtype)
        product = jnp.einsum("ntd,dphk->ntphk", x, kernel, precision=precision)
        return product, bias.astype(self.dtype)


def output_projection(width: int, dtype: Any) -> Dense:
    """All heads' results together: `[N, T, H, K]` -> `[N, T, D]`."""
    return Dense(width, ("heads", "head_width", "embed"), dtype, name="proj")


class Attention(nn.Module):
    """Multi-head self-attention of the backbone, scale 1/sqrt(K), softmax in float32.

    With a `window`, only its places ask: keys and values are of all places. That is for sampling:
    weights are not dropped.
    """

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        visible: Bool[Array, "#N T"] | None = None,
        window: Window | None = None,
    ) -> Float[Array, "N W D"]:
        width = x.shape[-1]
        qkv, bias = QKV(self.heads, self.dtype, name="qkv")(x)
        if window is None:
            x = attention(qkv, bias, visible, *dropout_seed(self, self.dropout))
        else:
            q, k, v = split_heads(qkv, bias)
            x = plain_attention(window.cut(q), k, v, None if visible is None else visible[:, None])
        return Dropout(self.dropout)(output_projection(width, self.dtype)(x))


class ChannelAttention(nn.Module):
    """Causal multi-head self-attention of the head, with LayerNorm on queries and keys.

    With a `cache`, x holds one place only, which attends to the places cached so far and itself.
    """

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"], cache: Cache | None = None
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        width = x.shape[-1]
        qkv, bias = QKV(self.heads, self.dtype, name="qkv")(x)
        q_norm = NormWeights(name="q_norm")(width // self.heads)
        k_norm = NormWeights(name="k_norm")(width // self.heads)
        if cache is None:
            norms = jnp.stack([*q_norm, *k_norm])
            x = channel_attention(qkv, bias, norms, *dropout_seed(self, self.dropout))
        else:
            x, keys, values = cached_attention(qkv, bias, (*q_norm, *k_norm), *cache)
            cache = Cache(keys, values, cache.place)
        return Dropout(self.dropout)(output_projection(width, self.dtype)(x)), cache


class NormWeights(nn.Module):
    """Scale and bias of a LayerNorm that is computed together with something else."""

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        scale = self.param("scale", nn.initializers.ones, (width,))
        return scale, self.param("bias", nn.initializers.zeros, (width,))


class Units(nn.Module):
    """The MLP's first product and its bias, not yet added."""

    units: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"]
    ) -> tuple[Float[Array, "N T F"], Float[Array, " F"]]:
        kernel_init = named_axes(xavier, "embed", "mlp")
        bias_init = named_axes(nn.initializers.zeros, "mlp")
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.units))
        bias = self.param("bias", bias_init, (self.units,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.matmul(x, kernel, precision=of_products(self.dtype)), bias.astype(self.dtype)


class Mlp(nn.Module):
    """Linear to 4D, exact GELU, linear back, with dropout after GELU and at the end.

    GELU's has the multiple of 2^-16 nearest to the rate; see `dropout.pair_rate`.
    """

    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        width = x.shape[-1]
        x, bias = Units(4 * width, self.dtype, name="fc1")(x)
        x = gelu_dropout(x, bias, *dropout_seed(self, self.dropout))
        x = Dense(width, ("mlp", "embed"), self.dtype, name="fc2")(x)
        return Dropout(self.dropout)(x)


class Block(nn.Module):
    """Pre-norm block of the backbone."""

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        visible: Bool[Array, "#N T"] | None = None,
        window: Window | None = None,
    ) -> tuple[Float[Array, "N W D"], None]:
        """Runs the block; with a `window`, for its places only, which see all the others."""
        attention = Attention(self.heads, self.dropout, self.dtype, name="attn")
        y = attention(layer_norm(self.dtype, name="norm1")(x), visible, window)
        x = y + (x if window is None else window.cut(x))
        mlp = Mlp(self.dropout, self.dtype, name="mlp")
        return x + mlp(layer_norm(self.dtype, name="norm2")(x)), None


class ConditionedBlock(nn.Module):
    """Block whose norms are modulated and whose branches are gated by a condition (AdaLN-Zero)."""

    width: int
    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.modulation = Modulation(6, self.dtype)
        self.norm1 = layer_norm(self.dtype)
        self.attn = ChannelAttention(self.heads, self.dropout, self.dtype)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = Mlp(self.dropout, self.dtype)

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
        """The block, with what `modulation` says of the condition."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        y, cache = self.attn(modulate(self.norm1(x), shift1, scale1), cache)
        x = x + gate1 * y
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2)), cache


class Unrolled(nn.Module):
    """Blocks one after another, each with parameters of its own (see `unstack`).

    The program is as large as all of them together and takes the longer to compile. It runs faster:
    nothing is cut from stacked parameters or put into stacked residuals, and blocks can be called
    one by one.
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


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Turns the parameters of stacked layers, wherever they are in the tree, into `Unrolled`'s."""
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


def stack_layers(
    block: type[nn.Module], layers: int, remat: str = "none", unrolled: bool = False
) -> Callable[..., Any]:
    """A block's class over depth: `(x, shared) -> (x, None)`, `shared` the same for all layers.

    As a scan, whose parameters have a leading axis of size `layers` and whose program is as large
    as one block whatever the depth; or with `unrolled` as `Unrolled`.
    """
    policy = REMAT_POLICIES[remat]
    if policy is not None:
        # In a scan nothing could be merged with the forward pass again; a barrier would only cost.
        block = nn.remat(block, prevent_cse=unrolled, policy=policy)
    if unrolled:
        return lambda *arguments: Unrolled(functools.partial(block, *arguments), layers)
    return nn.scan(
        block,
        length=layers,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
