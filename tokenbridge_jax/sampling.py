"""Sampling: positions revealed over `num_iter` steps in a random order, as one jitted program.

1. All L positions are hidden; every image draws an order of its positions.
2. Step s leaves `hidden_counts(...)[s]` positions hidden: the backbone looks at what is visible,
   guidance mixes its class and null features, and the head draws the indices of the positions
   revealed in this step.
3. After the last step nothing is hidden.

All randomness of an image follows from the seed and the image's sample index, and that of one
index from its position and channel besides: neither batch size nor device count nor the number of
positions revealed together enters it. What they can change is the rounding of products, which
decides a draw only where two levels are equally good to that rounding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from tokenbridge_jax.errors import UserError
from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig

GUIDANCE_SCHEDULES = ("linear", "constant")


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to sample.

    Attributes:
      num_iter: reveal steps; the paper's figures use 256.
      guidance: scale of classifier-free guidance, on the backbone's features; 1 turns it off and
        saves the null branch.
      guidance_schedule: "linear", from 1 with everything hidden to `guidance`, or "constant".
      temperature: divides the head's logits; 0 takes the most likely level.

    Raises:
      UserError: on construction, if a setting is out of range.
    """

    num_iter: int = 64
    guidance: float = 1.0
    guidance_schedule: str = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_iter < 1:
            raise UserError(f"sampling.num_iter={self.num_iter} must be at least 1")
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise UserError(f"sampling.temperature={self.temperature} must be 0 or more and finite")
        if not math.isfinite(self.guidance):
            raise UserError(f"sampling.guidance={self.guidance} must be finite")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise UserError(
                f"sampling.guidance_schedule='{self.guidance_schedule}' is not one of "
                f"{', '.join(GUIDANCE_SCHEDULES)}"
            )


def hidden_counts(positions: int, num_iter: int) -> np.ndarray:
    """How many positions are still hidden after each step: a cosine that ends in 0.

    At least one position is revealed at every step, so with more steps than positions the steps
    that would reveal nothing are left out. The floor is taken in float64, as the reference does.

    Returns:
      int32 array `[steps]`, strictly decreasing, `steps <= num_iter`.
    """
    counts: list[int] = []
    hidden = positions
    for step in range(1, num_iter):
        cosine = math.floor(positions * math.cos(math.pi / 2 * step / num_iter))
        hidden_next = max(1, min(hidden - 1, cosine))
        if hidden_next < hidden:
            counts.append(hidden_next)
        hidden = hidden_next
    return np.array([*counts, 0], np.int32)


def guidance_scales(positions: int, settings: SamplingSettings) -> np.ndarray:
    """The guidance scale of every step of `hidden_counts`: float32 array `[steps]`."""
    hidden = hidden_counts(positions, settings.num_iter)
    if settings.guidance_schedule == "constant":
        return np.full(len(hidden), settings.guidance, np.float32)
    # The reference still counts one hidden position at the last step.
    revealed = positions - np.maximum(hidden, 1)
    return (1 + (settings.guidance - 1) * revealed / positions).astype(np.float32)


def random_orders(
    seed: int | Integer[Array, ""], sample_indices: Int[Array, " B"], positions: int
) -> Int[Array, "B L"]:
    """A random order of the positions for every sample, from the seed and its sample index."""
    keys = _sample_keys(seed, sample_indices)[:, 0]
    return jax.vmap(lambda key: jax.random.permutation(key, positions))(keys)


def _sample_keys(
    seed: int | Integer[Array, ""], sample_indices: Int[Array, " B"]
) -> Key[Array, "B 2"]:
    """Two keys a sample: for its order, and for its indices."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(sample_indices)


def generate(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[Array | np.ndarray, " B"],
    sample_indices: Int[Array | np.ndarray, " B"],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    orders: Int[Array, "B L"] | None = None,
) -> Int[Array, "B L C"]:
    """Samples the indices of whole images (paper section 3.3).

    The program is compiled anew only for another model, batch size or `num_iter`, and for guidance
    on or off.

    Args:
      config: the model.
      params: its parameters.
      labels: the class of every image.
      sample_indices: the global number of every image; with `seed` it fixes all randomness.
      settings: how to sample.
      seed: of the orders and indices.
      orders: orders to use in place of random ones; the last entry is revealed first.

    Returns:
      Indices in autoencoder order, positions row-major.
    """
    return _generate(
        params,
        labels,
        sample_indices,
        orders,
        np.uint32(seed),
        guidance_scales(config.positions, settings),
        np.float32(settings.temperature),
        config=config,
        hidden=tuple(hidden_counts(config.positions, settings.num_iter).tolist()),
        guided=settings.guidance != 1.0,
    )


@functools.partial(jax.jit, static_argnames=("config", "hidden", "guided"))
def _generate(
    params: dict[str, Any],
    labels: Int[Array, " B"],
    sample_indices: Int[Array, " B"],
    orders: Int[Array, "B L"] | None,
    seed: Integer[Array, ""],
    scales: Float[Array, " steps"],
    temperature: Float[Array, ""],
    *,
    config: TokenBridgeConfig,
    hidden: tuple[int, ...],
    guided: bool,
) -> Int[Array, "B L C"]:
    model = TokenBridge(config)
    if orders is None:
        orders = random_orders(seed, sample_indices, config.positions)
    batch, positions = orders.shape
    steps = list(zip((positions, *hidden), hidden, strict=False))
    # What one step reveals at most; smaller steps are padded.
    slots = max(hidden_now - hidden_next for hidden_now, hidden_next in steps)

    # Class and null branches go through the backbone as one batch of 2B, side by side: an image's
    # two branches stay on one device.
    copies = 2 if guided else 1
    drop_class = jnp.arange(copies * batch) % copies == 1
    labels, both_orders = jnp.repeat(labels, copies), jnp.repeat(orders, copies, axis=0)
    index_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
        _sample_keys(seed, sample_indices)[:, 1], orders
    )

    def apply(method: Callable[..., Any], *arguments: Any) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    def reveal(
        indices: Int[Array, "B L C"], step: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[Int[Array, "B L C"], None]:
        hidden_now, hidden_next, scale = step
        start = jnp.maximum(hidden_now - slots, 0)

        def window(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, slots, axis=1)

        feature = apply(
            TokenBridge.features,
            jnp.repeat(indices, copies, axis=0),
            labels,
            both_orders,
            hidden_now,
            drop_class,
        )
        feature = window(feature)
        if guided:
            # In float32: a difference of near equals is about to be magnified.
            branches = feature.astype(jnp.float32).reshape(batch, copies, *feature.shape[1:])
            conditional, null = branches[:, 0], branches[:, 1]
            feature = null + scale * (conditional - null)
        drawn = apply(TokenBridge.sample_positions, feature, window(index_keys), temperature)
        slot = start + jnp.arange(slots)
        revealed = ((slot >= hidden_next) & (slot < hidden_now))[None, :, None]
        updated = jnp.where(revealed, drawn, window(indices))
        return jax.lax.dynamic_update_slice_in_dim(indices, updated, start, axis=1), None

    # In order layout until the end: revealing is then a slice. Hidden entries are never looked at.
    indices = jnp.zeros((batch, positions, config.channels), jnp.int32)
    now, next_ = jnp.array(steps, jnp.int32).T
    indices, _ = jax.lax.scan(reveal, indices, (now, next_, scales))
    return jnp.take_along_axis(indices, jnp.argsort(orders)[:, :, None], axis=1)
