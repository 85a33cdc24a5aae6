"""The transformer over a position's channels that the heads share."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from tokenbridge_jax.heads.head import Activations, IndexHead
from tokenbridge_jax.layers import Dense, LayerNorm, add_bias, copies
from tokenbridge_jax.ops.norm import normalize
from tokenbridge_jax.ops.precision import of_products
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.meshes import named_axes
from tokenbridge_jax.transformer import (
    ConditionedBlock,
    Modulation,
    block_flops,
    embedding_init,
    modulate,
    stack_layers,
)


class ChannelTransformer(IndexHead):
    """Small transformer over channels, conditioned on the backbone's feature.

    `causal`: whether a place sees those up to its own, or all of them.
    """

    causal: ClassVar[bool] = True
    float32_params: ClassVar[tuple[str, ...]] = ("classifier/bias",)
    width: int
    layers: int
    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    scan_layers: bool = True
    float8: bool = False

    @classmethod
    def from_config(
        cls, config: Any, channel_order: tuple[int, ...], levels: int, **others: Any
    ) -> "ChannelTransformer":
        """See `IndexHead.from_config`; `others` are fields of a subclass."""
        return cls(
            channel_order=channel_order,
            levels=levels,
            width=config.head_width,
            layers=config.head_layers,
            heads=config.head_heads,
            dropout=config.dropout,
            dtype=jnp.dtype(config.dtype),
            scan_layers=config.scan_layers,
            float8=config.float8,
            **others,
        )

    @classmethod
    def summary(cls, config: Any) -> str:
        """See `Head.summary`."""
        size = (
            f"{config.head_layers} layers of width {config.head_width}, {config.head_heads} heads"
        )
        group = config.channels_per_group
        return size + f", {group} channels a class" * (group > 1)

    @classmethod
    def position_flops(cls, config: Any) -> int:
        """See `Head.position_flops`. All scores count, though half of them are masked."""
        width, groups = config.head_width, config.groups
        return (
            config.head_layers * block_flops(groups, groups, width, modulation=6)
            + 2 * config.decoder_width * width  # condition_proj
            + groups * 2 * width * 2 * width  # final modulation
            + groups * 2 * width * config.joint_classes  # classifiers
        )

    @classmethod
    def activations(cls, config: Any) -> Activations:
        """See `Head.activations`."""
        hidden = config.head_width * config.head_layers
        return Activations(config.groups * hidden, config.groups * config.joint_classes)

    def setup(self) -> None:
        channels = len(self.channel_order)
        self.condition_proj = Dense((self.width,), (None, "embed"), self.dtype)
        embedding = named_axes(embedding_init, "channels", "embed")
        self.channel_embed = self.param("channel_embed", embedding, (channels, self.width))
        self.timestep_embed = self.param("timestep_embed", embedding, (channels, self.width))
        # Unrolled: on TPUs a scan spends a tenth of the step on copies of stacked residuals.
        stack = stack_layers(
            ConditionedBlock, self.layers, scan_layers=self.scan_layers, unroll=self.layers
        )
        self.blocks = stack(self.heads, self.dropout, self.dtype, self.causal, self.float8)
        self.norm = LayerNorm(self.dtype)
        self.final_modulation = Modulation(2, self.dtype)
        self.classifier = ChannelClassifier(channels, self.levels, self.dtype)

    def _condition(self, feature: Float[Array, "N Z"]) -> Float[Array, "N D"]:
        # Positions stay on the devices of their images, whatever the parameters' layout suggests.
        return meshes.constrain(self.condition_proj(feature), "batch", None)

    def _transform(
        self, tokens: Float[Array, "N C D"], condition: Float[Array, "N 1 D"]
    ) -> Float[Array, "N C V"]:
        """Logits of all places, from their tokens without the embeddings of the places."""
        x = meshes.constrain(add_bias(tokens, self.channel_embed), "batch", None, None)
        condition = copies(condition, tokens.shape, self.dtype)
        condition = nn.silu(add_bias(condition, self.timestep_embed))
        x, _ = self.blocks(x, condition)
        return self.classifier(self._modulated_norm(x, self.final_modulation(condition)))

    def _gumbel(self, keys: Key[Array, " N"]) -> Float[Array, "C N V"]:
        """Noise for every channel, from the position's key and the channel's place."""

        def draw(place: jax.Array, key: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(key, place), (self.levels,))

        places = jnp.arange(len(self.channel_order))
        return jax.vmap(lambda place: jax.vmap(functools.partial(draw, place))(keys))(places)

    def _modulated_norm(
        self, x: Float[Array, "N T D"], modulation: Float[Array, "N T 2*D"]
    ) -> Float[Array, "N T D"]:
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return modulate(normalize(self.norm(x)).astype(self.dtype), shift, scale)


class ChannelClassifier(nn.Module):
    """One linear classifier per channel, with float32 logits."""

    channels: int
    levels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"], place: Int[Array, ""] | None = None
    ) -> Float[Array, "N T V"]:
        """Classifies all C places, or with `place` the only one of x."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=0)
        kernel = self.param(
            "kernel",
            named_axes(init, "channels", "embed", "levels"),
            (self.channels, x.shape[-1], self.levels),
        ).astype(self.dtype)
        bias = self.param(
            "bias",
            named_axes(nn.initializers.zeros, "channels", "levels"),
            (self.channels, self.levels),
        )
        if place is not None:
            kernel, bias = kernel[place][None], bias[place][None]
        # One product per channel, with x on the left. An einsum would put the transposed kernel
        # there, and XLA's CPU backend cannot run that product from bfloat16 to float32.
        product = functools.partial(
            jnp.dot, precision=of_products(self.dtype), preferred_element_type=jnp.float32
        )
        logits = jax.vmap(product, (1, 0), 1)(x, kernel)
        return logits + bias[None]


def tempered_log_prob(
    logits: Float[Array, "*N V"], index: Int[Array, "*N"], temperature: Float[Array, ""]
) -> Float[Array, "*N"]:
    """Log-probability of a drawn index, as `Head.sample` defines it."""
    tempered = logits / jnp.where(temperature > 0, temperature, 1)
    return -optax.softmax_cross_entropy_with_integer_labels(tempered, index)
