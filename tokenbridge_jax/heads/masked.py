"""Masked prediction of channels: a position's C indices in K steps, several at each step.

A bidirectional transformer sees the feature, the known channels' indices and a mask embedding at
the hidden ones, and predicts all hidden channels at once. (Over the positions of an image this is
MaskGIT's, Chang et al., 2022, arXiv 2202.04200.) K = 1 predicts all channels independently of each
other, as the parallel head does; K = C predicts one after another.

After step k of K, floor(k C / K) channels are known. Which ones, `reveal_order` says:

    fixed         The first ones of the channel order. The channels of a step are independent, given
                  those before, so the likelihood is exact: a product over the steps.
    confidence    At every step all hidden channels are drawn. Those whose draws are most likely
                  become known (without MaskGIT's noise; on a tie, the earlier of the channel order)
                  and the others are drawn anew. There is no likelihood: what a step reveals depends
                  on the draws.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from tokenbridge_jax.heads.channel_transformer import ChannelTransformer, tempered_log_prob
from tokenbridge_jax.heads.head import Guidance, guided
from tokenbridge_jax.layers import copies, look_up, pick
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.meshes import named_axes
from tokenbridge_jax.transformer import embedding_init

REVEAL_ORDERS = ("fixed", "confidence")


class MaskedHead(ChannelTransformer):
    """At every hidden place, sees the indices of the known places.

    Attributes:
      steps: K.
      reveal_order: one of `REVEAL_ORDERS`; see the module.
    """

    causal: ClassVar[bool] = False
    has_groups: ClassVar[bool] = False  # Its steps are groups.
    steps: int = 4
    reveal_order: str = "fixed"

    @classmethod
    def from_config(
        cls, config: Any, channel_order: tuple[int, ...], levels: int, **others: Any
    ) -> ChannelTransformer:
        """See `ChannelTransformer.from_config`."""
        steps, order = config.reveal_steps, config.reveal_order
        return super().from_config(
            config, channel_order, levels, steps=steps, reveal_order=order, **others
        )

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Head.check_config`."""
        if config.reveal_order not in REVEAL_ORDERS:
            raise UserError(
                f"model.reveal_order='{config.reveal_order}' is not one of "
                f"{', '.join(REVEAL_ORDERS)}"
            )
        if config.reveal_steps > config.channels:
            other = ", or model.head=parallel" if config.channels == 1 else " or less"
            raise UserError(
                f"model.reveal_steps={config.reveal_steps} must be at most the number of channels, "
                f"{config.channels}; set model.reveal_steps={config.channels}{other}"
            )

    @classmethod
    def check_drawing(cls, trained: Any, drawing: Any) -> None:
        """See `Head.check_drawing`. In fixed order only the places of its own steps are trained."""
        if trained.reveal_order == "fixed" and drawing.reveal_steps != trained.reveal_steps:
            raise UserError(
                f"model.reveal_steps={drawing.reveal_steps}: this model was trained for "
                f"{trained.reveal_steps} steps in fixed order and can draw in no other number; "
                "leave it out, or train with --config.model.reveal_order=confidence"
            )

    @classmethod
    def summary(cls, config: Any) -> str:
        """See `Head.summary`."""
        steps = f"{config.reveal_steps} steps in {config.reveal_order} order"
        return f"{super().summary(config)}, {steps}"

    @classmethod
    def drawing_flops(cls, config: Any, branches: int) -> int:
        """See `Head.drawing_flops`; all steps share the projection of the feature."""
        projection = 2 * config.decoder_width * config.head_width
        return projection + config.reveal_steps * (cls.position_flops(config) - projection)

    @property
    def has_probabilities(self) -> bool:
        """See `Head.has_probabilities`; in confidence order there are none."""
        return self.reveal_order == "fixed"

    def setup(self) -> None:
        # The tables of `ChannelAR`, for all places.
        token_embeddings = self.param(
            "token_embeddings",
            named_axes(nn.initializers.normal(1.0), "channels", "levels", "embed"),
            (len(self.channel_order), self.levels, self.width),
        )
        self.token_embeddings = meshes.constrain(token_embeddings, None, None, None)
        self.mask_embed = self.param(
            "mask_embed", named_axes(embedding_init, None, "embed"), (1, self.width)
        )
        super().setup()

    def loss(
        self, feature: Float[Array, "N Z"], targets: Integer[Array, "N C"], keys: Key[Array, " N"]
    ) -> Float[Array, "N C"]:
        """Cross-entropy of hidden channels, with known ones drawn for each position.

        In fixed order a step is drawn. The loss is K times the cross-entropy of its channels and 0
        for the others, so its expectation is exactly `nll`. In confidence order the number of known
        channels, s, is drawn from 0..C-1, and then which ones. The loss is C / (C - s) times the
        cross-entropy of the hidden ones. The expectation of its sum over the channels is the
        mean, over all orders, of the negative log-likelihood of one channel after another (Uria et
        al., 2014, arXiv 1310.1757; Hoogeboom et al., 2022, arXiv 2110.02037).
        """
        known, weight = jax.vmap(self._draw_known)(keys)
        chosen = targets[:, np.array(self.channel_order)]
        logits = self._predict(self._condition(feature), chosen, known)
        nll = jax.nn.logsumexp(logits, axis=-1) - pick(logits, chosen)
        return jnp.take(weight * nll, np.argsort(self.channel_order), axis=1, unique_indices=True)

    def logits(
        self, feature: Float[Array, "N Z"], indices: Integer[Array, "N C"], as_sampled: bool = False
    ) -> Float[Array, "N C V"]:
        """See `Head.logits`; takes K passes.

        Raises:
          UserError: the channels have no fixed order.
        """
        del as_sampled
        if not self.has_probabilities:
            raise UserError(
                f"there is no exact likelihood with model.reveal_order='{self.reveal_order}': "
                "which channels a step reveals depends on the draws"
            )
        condition = self._condition(feature)
        chosen = indices[:, np.array(self.channel_order)]
        places = jnp.arange(len(self.channel_order))

        def one_step(
            head: "MaskedHead", carry: tuple[jax.Array, ...], bounds: Int[Array, "2"]
        ) -> tuple[tuple[jax.Array, ...], None]:
            condition, logits = carry
            found = head._predict(condition, chosen, (places < bounds[0])[None])
            inside = (bounds[0] <= places) & (places < bounds[1])
            return (condition, jnp.where(inside[:, None], found, logits)), None

        start = condition, jnp.zeros((*chosen.shape, self.levels))
        return self._over_steps(one_step)(self, start, self._bounds())[0][1]

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Int[Array, "N C"], Float[Array, " N"] | None]:
        """See `Head.sample`; takes K passes, each with its own noise.

        In confidence order, there is no log-probability.
        """
        condition = self._condition(guided(feature, guidance))
        shape = len(feature), len(self.channel_order)

        def one_step(
            head: "MaskedHead", carry: tuple[jax.Array, ...], xs: tuple[Any, ...]
        ) -> tuple[tuple[jax.Array, ...], None]:
            (condition, indices, known, log_prob), (step, bounds) = carry, xs
            logits = head._predict(condition, indices, known)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            noise = temperature * head._gumbel(step_keys).swapaxes(0, 1)
            drawn = jnp.where(known, indices, jnp.argmax(logits + noise, axis=-1))
            of_drawn = tempered_log_prob(logits, drawn, temperature)
            revealed = head._reveal(of_drawn, known, bounds[1]) & ~known
            log_prob += jnp.sum(jnp.where(revealed, of_drawn, 0), axis=1)
            return (condition, drawn, known | revealed, log_prob), None

        nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape[0])
        xs = jnp.arange(self.steps), self._bounds()
        start = condition, *nothing
        (_, drawn, _, log_prob), _ = self._over_steps(one_step)(self, start, xs)
        indices = drawn[:, np.argsort(self.channel_order)]
        return indices, log_prob if self.has_probabilities else None

    def _bounds(self) -> Int[Array, "K 2"]:
        """The number of channels that are known before and after each step."""
        counts = np.arange(self.steps + 1) * len(self.channel_order) // self.steps
        return jnp.asarray(np.stack([counts[:-1], counts[1:]], axis=1))

    def _draw_known(self, key: Key[Array, ""]) -> tuple[Bool[Array, " C"], Float[Array, " C"]]:
        """The known places of a position in training, and the weights of its losses."""
        channels = len(self.channel_order)
        number_key, order_key = jax.random.split(key)
        if self.reveal_order == "fixed":
            places = jnp.arange(channels)
            start, stop = self._bounds()[jax.random.randint(number_key, (), 0, self.steps)]
            inside = (start <= places) & (places < stop)
            return places < start, jnp.where(inside, float(self.steps), 0)
        rank = jax.random.permutation(order_key, channels)
        count = jax.random.randint(number_key, (), 0, channels)
        return rank < count, jnp.where(rank < count, 0, channels / (channels - count))

    def _reveal(
        self, log_prob: Float[Array, "N C"], known: Bool[Array, "N C"], count: Int[Array, ""]
    ) -> Bool[Array, "#N C"]:
        """The `count` places that are known after a step, from the log-probability of each draw."""
        if self.reveal_order == "fixed":
            return jnp.arange(len(self.channel_order))[None] < count
        certain_first = jnp.argsort(jnp.where(known, -jnp.inf, -log_prob), axis=1, stable=True)
        return jnp.argsort(certain_first, axis=1) < count

    def _predict(
        self,
        condition: Float[Array, "N D"],
        indices: Integer[Array, "N C"],
        known: Bool[Array, "#N C"],
    ) -> Float[Array, "N C V"]:
        """Logits of all places, from the indices of the known ones; all in channel order."""
        of_place = functools.partial(look_up, dtype=self.dtype)
        seen = jax.vmap(of_place, (0, 1), 1)(self.token_embeddings, indices)
        mask = copies(self.mask_embed[None], seen.shape, self.dtype)
        tokens = jnp.where(known[..., None], seen, mask)
        tokens += copies(condition[:, None], seen.shape, self.dtype)
        return self._transform(tokens, condition[:, None])

    def _over_steps(self, body: Any) -> Any:
        """`body(head, carry, xs)` for every step, with the same parameters.

        The condition is in the carry: of a constant, `nn.scan` would also compute the modulations
        outside of the loop, for nothing.
        """
        split: Any = {"params": False, "dropout": True}
        return nn.scan(body, variable_broadcast="params", split_rngs=split)
