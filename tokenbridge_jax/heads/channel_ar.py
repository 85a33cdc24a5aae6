"""Autoregressive channel head (paper section 3.3): one position's C indices, one after another."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from tokenbridge_jax.heads.channel_transformer import ChannelTransformer, tempered_log_prob
from tokenbridge_jax.heads.head import Guidance, guided
from tokenbridge_jax.layers import look_up
from tokenbridge_jax.ops.cached_attention import Cache
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.meshes import named_axes


class ChannelAR(ChannelTransformer):
    """At every place, sees the indices of the channels before it.

    `first_token_quirk`: the released weights were evaluated with the first timestep embedding added
    to the first token in sampling, but not in training. On for imported weights only.
    """

    is_published: ClassVar[bool] = True
    has_quirk: ClassVar[bool] = True
    least_places: ClassVar[int] = 2
    first_token_quirk: bool = False

    @classmethod
    def from_config(
        cls, config: Any, channel_order: tuple[int, ...], levels: int, **others: Any
    ) -> ChannelTransformer:
        """See `ChannelTransformer.from_config`."""
        quirk = config.first_token_quirk
        return super().from_config(config, channel_order, levels, first_token_quirk=quirk, **others)

    def setup(self) -> None:
        # PyTorch's default for embedding tables, kept by the reference: N(0, 1).
        token_embeddings = self.param(
            "token_embeddings",
            named_axes(nn.initializers.normal(1.0), "channels", "levels", "embed"),
            (len(self.channel_order) - 1, self.levels, self.width),
        )
        # All-gathered before the look-up, like the backbone's tables.
        self.token_embeddings = meshes.constrain(token_embeddings, None, None, None)
        super().setup()

    def logits(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """See `Head.logits`."""
        previous = indices[:, np.array(self.channel_order[:-1])]
        condition = self._condition(feature)
        first = self._sampled_first(condition) if as_sampled else condition
        of_place = functools.partial(look_up, dtype=self.dtype)
        tokens = jax.vmap(of_place, (0, 1), 1)(self.token_embeddings, previous)
        tokens = jnp.concatenate([first[:, None], tokens], axis=1)
        return self._transform(tokens, condition[:, None])

    def _sampled_first(self, condition: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """The first token in sampling, without its channel embedding."""
        if not self.first_token_quirk:
            return condition
        return condition + self.timestep_embed[:1].astype(self.dtype)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Int[Array, "N C"], Float[Array, " N"]]:
        """See `Head.sample`; uses cached keys and values.

        Everything that does not depend on indices exists for all channels at once: at size L 0.8 MB
        per position, so 20 GB when one step reveals all positions of 100 images.
        """
        feature = guided(feature, guidance)
        channels, count = len(self.channel_order), len(feature)
        if count == 1:
            # XLA turns products with a single row into slow sums over whole weights.
            feature, keys = jnp.repeat(feature, 2, axis=0), jnp.repeat(keys, 2)
            indices, log_probs = self.sample(feature, keys, temperature)
            return indices[:1], log_probs[:1]
        condition = self._condition(feature)
        empty = jnp.zeros((count, self.heads, channels, self.width // self.heads), self.dtype)
        empty = meshes.constrain(empty, "batch", "heads", None, None)
        caches = [Cache(empty, empty, jnp.int32(0))] * self.layers

        # Everything that does not depend on indices is computed for all channels at once. The
        # embedding of a channel is added to the token before it.
        embed = self.channel_embed.astype(self.dtype)
        first = self._sampled_first(condition) + embed[:1]
        tokens = self.token_embeddings.astype(self.dtype) + embed[1:, None]
        conditions = condition[None] + self.timestep_embed.astype(self.dtype)[:, None]
        conditions = nn.silu(meshes.constrain(conditions, None, "batch", None))[:, :, None]
        modulations = [block.modulation(conditions) for block in self.blocks.blocks]
        modulations.append(self.final_modulation(conditions))
        # argmax(logits / T + gumbel) = argmax(logits + T * gumbel), which also works for T = 0.
        noise = temperature * self._gumbel(keys)

        def next_channel(
            head: "ChannelAR", carry: tuple[jax.Array, list[Cache]], xs: tuple[Any, ...]
        ) -> tuple[tuple[jax.Array, list[Cache]], tuple[jax.Array, ...]]:
            token, caches = carry
            place, modulations, noise = xs
            # Without the barrier, XLA slices in front of every norm and splits the norm.
            *modulations, final_modulation = jax.lax.optimization_barrier(modulations)
            x = meshes.constrain(token[:, None], "batch", None, None)
            for i, (block, modulation) in enumerate(
                zip(head.blocks.blocks, modulations, strict=True)
            ):
                cache = caches[i]._replace(place=place)
                x, caches[i] = block.modulated(x, modulation, cache)
            x = head._modulated_norm(x, final_modulation)
            logits = head.classifier(x, place)[:, 0]
            index = jnp.argmax(logits + noise, axis=-1)
            # The last channel's token is never used, so there is no table for it.
            token = tokens[jnp.minimum(place, channels - 2), index]
            return (token, caches), (index, tempered_log_prob(logits, index, temperature))

        scan = nn.scan(next_channel, variable_broadcast="params", split_rngs={"params": False})
        places = jnp.arange(channels)
        xs = (places, modulations, noise)
        _, (indices, log_probs) = scan(self, (first, caches), xs)
        return indices.T[:, np.argsort(self.channel_order)], log_probs.sum(axis=0)
