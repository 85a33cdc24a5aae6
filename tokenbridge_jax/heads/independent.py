"""The paper's "parallel prediction": all C channels at once, independent of each other.

This is `ChannelAR` without the tokens of previous indices. Everything else is the same, so that the
two heads differ only in what a channel may depend on. (Attention stays causal, which changes
nothing.) Configs and checkpoints call this head by the paper's name: `model.head = "parallel"`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from tokenbridge_jax.heads.channel_transformer import ChannelTransformer, tempered_log_prob
from tokenbridge_jax.heads.head import Guidance, guided
from tokenbridge_jax.layers import copies


class IndependentHead(ChannelTransformer):
    """At every place, sees the feature alone."""

    def logits(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """See `Head.logits`; ignores `indices`."""
        del indices, as_sampled
        return self._logits(feature)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Int[Array, "N C"], Float[Array, " N"]]:
        """See `Head.sample`; one pass draws all channels."""
        logits = self._logits(guided(feature, guidance))
        noise = temperature * self._gumbel(keys).swapaxes(0, 1)
        drawn = jnp.argmax(logits + noise, axis=-1)
        indices = drawn[:, np.argsort(self.channel_order)]
        return indices, tempered_log_prob(logits, drawn, temperature).sum(axis=1)

    def _logits(self, feature: Float[Array, "N Z"]) -> Float[Array, "N C V"]:
        condition = self._condition(feature)[:, None]
        shape = (len(feature), len(self.channel_order), self.width)
        return self._transform(copies(condition, shape, self.dtype), condition)
