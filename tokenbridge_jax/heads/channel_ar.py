"""Autoregressive channel head (paper section 3.3): one position's C indices, one after another.

Works on N positions side by side. Channels come in *channel order*: place c of the sequence holds
channel `channel_order[c]`. Outside the head, indices are always in autoencoder order.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Integer, Key

from tokenbridge_jax import parallel
from tokenbridge_jax.parallel import named_axes
from tokenbridge_jax.transformer import (
    Cache,
    ConditionedBlock,
    Modulation,
    embedding_init,
    layer_norm,
    modulate,
    stack_layers,
    xavier,
)


class ChannelAR(nn.Module):
    """Small causal transformer over channels, conditioned on the backbone's feature.

    `first_token_quirk`: the released weights were evaluated with the first timestep embedding added
    to the first token when sampling, though not in training. On for imported weights only.
    """

    channel_order: tuple[int, ...]
    levels: int
    width: int
    layers: int
    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    first_token_quirk: bool = False
    unrolled: bool = False

    def setup(self) -> None:
        channels = len(self.channel_order)
        self.condition_proj = nn.Dense(
            self.width, dtype=self.dtype, kernel_init=named_axes(xavier, None, "embed")
        )
        # PyTorch's default for embedding tables, kept by the reference: N(0, 1).
        token_embeddings = self.param(
            "token_embeddings",
            named_axes(nn.initializers.normal(1.0), "channels", "levels", "embed"),
            (channels - 1, self.levels, self.width),
        )
        # Gathered before it is looked up in, like the backbone's tables.
        self.token_embeddings = parallel.constrain(token_embeddings, None, None, None)
        embedding = named_axes(embedding_init, "channels", "embed")
        self.channel_embed = self.param("channel_embed", embedding, (channels, self.width))
        self.timestep_embed = self.param("timestep_embed", embedding, (channels, self.width))
        self.blocks = stack_layers(ConditionedBlock, self.layers, unrolled=self.unrolled)(
            self.width, self.heads, self.dropout, self.dtype
        )
        self.norm = layer_norm(self.dtype)
        self.final_norm = layer_norm(self.dtype, affine=False)
        self.final_modulation = Modulation(2, self.dtype)
        self.classifier = ChannelClassifier(channels, self.levels, self.dtype)

    def logits(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"]
    ) -> Float[Array, "N C V"]:
        """Teacher-forced float32 logits, channels in channel order.

        Args:
          feature: what the backbone says of each position.
          indices: all C indices, in autoencoder order; place c sees those of places before c.
        """
        previous = indices[:, np.array(self.channel_order[:-1])]
        place = np.arange(len(self.channel_order) - 1)
        condition = parallel.constrain(self.condition_proj(feature), "batch", None)[:, None]
        tokens = self.token_embeddings[place, previous].astype(self.dtype)
        x = jnp.concatenate([condition, tokens], axis=1) + self._places(self.channel_embed)
        condition = nn.silu(condition + self._places(self.timestep_embed))
        x = parallel.constrain(x, "batch", None, None)
        x, _ = self.blocks(x, condition)
        return self.classifier(self._modulated_norm(x, self.final_modulation(condition)))

    def nll(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"]
    ) -> Float[Array, "N C"]:
        """Negative log-likelihood of every index in nats, in autoencoder order."""
        order = np.array(self.channel_order)
        nll = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(feature, indices), indices[:, order].astype(jnp.int32)
        )
        return nll[:, np.argsort(order)]

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        log_probs: bool = False,
    ) -> Int[Array, "N C"] | tuple[Int[Array, "N C"], Float[Array, " N"]]:
        """Draws the C indices of every position, with cached keys and values.

        For an unrolled model. What does not depend on indices exists for all channels at once: at
        size L 0.8 MB a position, so 20 GB where one step reveals all of 100 images.

        Args:
          feature: what the backbone says of each position, guidance included.
          keys: a random key a position; what is drawn depends on nothing else that is random.
          temperature: divides the logits; 0 takes the most likely level at every channel.
          log_probs: whether the positions' log-probabilities are asked for.

        Returns:
          Indices in autoencoder order; with `log_probs` also the log-probability of each position's
          indices, in nats and float32, among those that this temperature draws. Where it is 0 and
          draws one outcome only, it is that of temperature 1.
        """
        channels, count = len(self.channel_order), len(feature)
        if count == 1:
            # XLA makes sums over whole weights of products with a single row.
            feature, keys = jnp.repeat(feature, 2, axis=0), jnp.repeat(keys, 2)
            drawn = self.sample(feature, keys, temperature, log_probs)
            return jax.tree.map(lambda x: x[:1], drawn)
        # Positions stay where their images are, whatever the parameters' layout suggests.
        condition = parallel.constrain(self.condition_proj(feature), "batch", None)
        first = condition
        if self.first_token_quirk:
            first = first + self.timestep_embed[:1].astype(self.dtype)
        empty = jnp.zeros((count, self.heads, channels, self.width // self.heads), self.dtype)
        empty = parallel.constrain(empty, "batch", "heads", None, None)
        caches = [Cache(empty, empty, jnp.int32(0))] * self.layers

        # What does not depend on indices is computed for all channels at once. The embedding of a
        # channel goes with the token before it.
        embed = self._places(self.channel_embed)[0]
        first = first + embed[:1]
        tokens = self.token_embeddings.astype(self.dtype) + embed[1:, None]
        conditions = condition[None] + self.timestep_embed.astype(self.dtype)[:, None]
        conditions = nn.silu(parallel.constrain(conditions, None, "batch", None))[:, :, None]
        modulations = [block.modulation(conditions) for block in self.blocks.blocks]
        modulations.append(self.final_modulation(conditions))
        # argmax(logits / T + gumbel) = argmax(logits + T * gumbel), and the latter knows T = 0.
        noise = temperature * self._gumbel(keys)

        def next_channel(
            head: "ChannelAR", carry: tuple[jax.Array, list[Cache]], xs: tuple[Any, ...]
        ) -> tuple[tuple[jax.Array, list[Cache]], tuple[jax.Array, ...]]:
            token, caches = carry
            place, modulations, noise = xs
            # Cut out by themselves once, or XLA cuts in front of every norm and splits the norm.
            *modulations, final_modulation = jax.lax.optimization_barrier(modulations)
            x = parallel.constrain(token[:, None], "batch", None, None)
            for i, (block, modulation) in enumerate(
                zip(head.blocks.blocks, modulations, strict=True)
            ):
                cache = caches[i]._replace(place=place)
                x, caches[i] = block.modulated(x, modulation, cache)
            x = head._modulated_norm(x, final_modulation)
            logits = head.classifier(x, place)[:, 0]
            index = jnp.argmax(logits + noise, axis=-1)
            drawn: tuple[jax.Array, ...] = (index,)
            if log_probs:
                tempered = logits / jnp.where(temperature > 0, temperature, 1)
                nll = optax.softmax_cross_entropy_with_integer_labels(tempered, index)
                drawn = index, -nll
            # The last channel's token is never used; it needs no table of its own.
            return (tokens[jnp.minimum(place, channels - 2), index], caches), drawn

        scan = nn.scan(next_channel, variable_broadcast="params", split_rngs={"params": False})
        places = jnp.arange(channels)
        xs = (places, modulations, noise)
        _, (indices, *of_channels) = scan(self, (first, caches), xs)
        indices = indices.T[:, np.argsort(self.channel_order)]
        return (indices, of_channels[0].sum(axis=0)) if log_probs else indices

    def _gumbel(self, keys: Key[Array, " N"]) -> Float[Array, "C N V"]:
        """Noise for every channel, from the position's key and the channel's place."""

        def draw(place: jax.Array, key: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(key, place), (self.levels,))

        places = jnp.arange(len(self.channel_order))
        return jax.vmap(lambda place: jax.vmap(functools.partial(draw, place))(keys))(places)

    def _places(self, embedding: Float[Array, "C D"]) -> Float[Array, "1 C D"]:
        return embedding.astype(self.dtype)[None]

    def _modulated_norm(
        self, x: Float[Array, "N T D"], modulation: Float[Array, "N T 2*D"]
    ) -> Float[Array, "N T D"]:
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return modulate(self.final_norm(self.norm(x)), shift, scale)


class ChannelClassifier(nn.Module):
    """One linear classifier a channel, with float32 logits."""

    channels: int
    levels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"], place: Int[Array, ""] | None = None
    ) -> Float[Array, "N T V"]:
        """Classifies all C places, or with `place` the one that x holds."""
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
        # One product a channel with x on the left: einsum puts the kernel there, transposed, and
        # XLA's CPU backend cannot run that product from bfloat16 to float32.
        product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        logits = jax.vmap(product, (1, 0), 1)(x, kernel)
        return logits + bias[None]
