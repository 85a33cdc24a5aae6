"""Groups of channels as joint classes (an ablation of the paper).

A head for C/g channels of V**g levels predicts g neighbours in the channel order at a time, with
one softmax over all their combinations. A class is a number in base V, whose highest digit is the
group's first channel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from tokenbridge_jax.heads.head import Guidance, IndexHead
from tokenbridge_jax.layers import pick


class GroupedHead(IndexHead):
    """Splits joint classes into channels, so that likelihoods are comparable with other heads'.

    `make_joint` makes the head of the groups, which predicts them in the order 0, 1, ...
    """

    group: int
    make_joint: Callable[[], IndexHead]

    def setup(self) -> None:
        self.joint = self.make_joint()

    def logits(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """See `Head.logits`; sums over the later channels of a group."""
        levels, groups = self.levels, len(self.channel_order) // self.group
        chosen = indices[:, np.array(self.channel_order)].astype(jnp.int32)
        chosen = chosen.reshape(-1, groups, self.group)
        places = levels ** np.arange(self.group)[::-1]
        joint = jnp.sum(chosen * places[None, None], axis=-1)
        rest = self.joint.logits(feature, joint, as_sampled)
        parts = []
        for place in range(self.group):
            rest = rest.reshape(-1, groups, levels, levels ** (self.group - 1 - place))
            parts.append(jax.nn.logsumexp(rest, axis=-1))
            rest = pick(rest, chosen[:, :, place, None], axis=2)
        return jnp.stack(parts, axis=2).reshape(len(indices), -1, levels)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Int[Array, "N C"], Float[Array, " N"] | None]:
        """See `Head.sample`; the temperature applies to joint classes."""
        joint, log_probs = self.joint.sample(feature, keys, temperature, guidance)
        places = self.levels ** np.arange(self.group)[::-1]
        digits = joint[:, :, None] // places[None, None] % self.levels
        return digits.reshape(len(joint), -1)[:, np.argsort(self.channel_order)], log_probs
