"""Transformer blocks shared by the backbone (over positions) and the head (over channels).

A block is called as `block(x, mask, condition, cache)` and returns `(x, cache)`, so that
`stack_layers` can scan any of them over depth. Dropout acts exactly when a "dropout" key is given
to `apply`: training gives one, nothing else does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenbridge_jax.parallel import named_axes

NORM_EPSILON = 1e-6

# What the backward pass keeps of a block's forward pass; the rest it computes again. `None` keeps
# everything.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

embedding_init = nn.initializers.normal(0.02)
xavier = nn.initializers.xavier_uniform()


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


class Cache(NamedTuple):
    """Keys and values of the places already seen, and the place being computed."""

    keys: Float[Array, "*layers N T H K"]
    values: Float[Array, "*layers N T H K"]
    place: Int[Array, "*layers"]


class Dropout(nn.Module):
    """Dropout that is on exactly when the caller of `apply` gave a "dropout" key."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Attention(nn.Module):
    """Multi-head self-attention, scale 1/sqrt(K), softmax in float32.

    `qk_norm` normalises queries and keys per head, with affine weights. With a `cache`, x holds one
    place only, which attends to the places cached so far and itself.
    """

    heads: int
    qk_norm: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        mask: Bool[Array, "#N #T S"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        width = x.shape[-1]
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=named_axes(xavier, "embed", "qkv", "heads", "head_width"),
            bias_init=named_axes(nn.initializers.zeros, "qkv", "heads", "head_width"),
            name="qkv",
        )(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q = layer_norm(self.dtype, name="q_norm")(q)
            k = layer_norm(self.dtype, name="k_norm")(k)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, cache.place, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, cache.place, axis=1)
            cache = Cache(k, v, cache.place)
        scores = jnp.einsum("nqhk,nshk->nhqs", q, k, preferred_element_type=jnp.float32)
        scores *= q.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores).astype(self.dtype)
        weights = Dropout(self.dropout)(weights)
        x = jnp.einsum("nhqs,nshk->nqhk", weights, v)
        x = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=named_axes(xavier, "heads", "head_width", "embed"),
            bias_init=named_axes(nn.initializers.zeros, "embed"),
            name="proj",
        )(x)
        return Dropout(self.dropout)(x), cache


class Mlp(nn.Module):
    """Linear to 4D, exact GELU, linear back."""

    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        width = x.shape[-1]
        x = nn.Dense(
            4 * width,
            dtype=self.dtype,
            kernel_init=named_axes(xavier, "embed", "mlp"),
            bias_init=named_axes(nn.initializers.zeros, "mlp"),
            name="fc1",
        )(x)
        x = Dropout(self.dropout)(nn.gelu(x, approximate=False))
        x = nn.Dense(
            width,
            dtype=self.dtype,
            kernel_init=named_axes(xavier, "mlp", "embed"),
            bias_init=named_axes(nn.initializers.zeros, "embed"),
            name="fc2",
        )(x)
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
        mask: Bool[Array, "#N #T S"] | None = None,
        condition: None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        attention = Attention(self.heads, dropout=self.dropout, dtype=self.dtype, name="attn")
        y, cache = attention(layer_norm(self.dtype, name="norm1")(x), mask, cache)
        x = x + y
        mlp = Mlp(self.dropout, self.dtype, name="mlp")
        return x + mlp(layer_norm(self.dtype, name="norm2")(x)), cache


class ConditionedBlock(nn.Module):
    """Block whose norms are modulated and whose branches are gated by a condition (AdaLN-Zero)."""

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        mask: Bool[Array, "#N #T S"],
        condition: Float[Array, "N T D"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache | None]:
        modulation = nn.DenseGeneral(
            (6, x.shape[-1]),
            dtype=self.dtype,
            kernel_init=named_axes(nn.initializers.zeros, "embed", None, None),
            name="modulation",
        )(nn.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, :, i] for i in range(6))
        attention = Attention(self.heads, True, self.dropout, self.dtype, name="attn")
        y = modulate(layer_norm(self.dtype, name="norm1")(x), shift1, scale1)
        y, cache = attention(y, mask, cache)
        x = x + gate1 * y
        y = modulate(layer_norm(self.dtype, name="norm2")(x), shift2, scale2)
        return x + gate2 * Mlp(self.dropout, self.dtype, name="mlp")(y), cache


def stack_layers(block: type[nn.Module], layers: int, remat: str = "none") -> Callable[..., Any]:
    """A block's class scanned over depth: `(x, mask, condition, cache) -> (x, cache)`.

    Parameters and cache get a leading axis of size `layers`; the program is as large as one block
    whatever the depth.
    """
    policy = REMAT_POLICIES[remat]
    if policy is not None:
        block = nn.remat(block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        length=layers,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        out_axes=0,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
