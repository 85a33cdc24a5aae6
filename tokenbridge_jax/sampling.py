"""Sampling: positions revealed over `num_iter` steps in some order, as one jitted program.

1. All L positions are hidden, or of an image that is edited M of them; every image has an order of
   its positions, the hidden ones first.
2. Step s leaves `hidden_counts(...)[s]` positions hidden: the backbone looks at what is visible,
   guidance mixes its class and null features, and the head draws the indices of the positions
   revealed in this step.
3. After the last step nothing is hidden.

In *confidence* order (paper, figure 8) the head draws all that is hidden at every step, and the
positions are revealed whose drawn indices are most likely.

Steps with about equally many visible positions run as one *stage*, a scan whose encoder and head
are as large as the largest of them needs (see `schedule.plan_stages`).

All randomness of an image follows from the seed and the image's sample index, and that of one
index from its position and channel besides: neither batch size nor device count nor the number of
positions revealed together enters it. What they can change is the rounding of products, which
decides a draw only where two levels are equally good to that rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped

from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig
from tokenbridge_jax.orders import hidden_first, make_orders, sample_keys
from tokenbridge_jax.schedule import (
    MAX_STAGES,
    MAX_STAGES_SCANNED,
    SamplingSettings,
    Stage,
    guidance_scales,
    hidden_counts,
    plan_stages,
)
from tokenbridge_jax.transformer import Window, unstack


class Known(NamedTuple):
    """What images have already, for the rest of them to be drawn.

    Attributes:
      indices: in autoencoder order, positions row-major. At hidden positions they count for
        nothing; previews show them there.
      hidden: which positions are drawn, in every image as many.
      num_hidden: M, how many these are.
    """

    indices: Integer[Array | np.ndarray, "B L C"]
    hidden: Bool[Array | np.ndarray, "B L"]
    num_hidden: int


# Called with the steps done, the number of all steps, and the state then.
Preview = Callable[[int, int, Any], None]


def generate(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[Array | np.ndarray, " B"] | Float[Array | np.ndarray, "B classes"],
    sample_indices: Int[Array | np.ndarray, " B"],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    orders: Int[Array, "B L"] | None = None,
    known: Known | None = None,
    preview: Preview | None = None,
    preview_every: int = 1,
) -> Int[Array, "B L C"]:
    """Samples the indices of whole images (paper section 3.3), or the hidden ones of `known`.

    The program is compiled anew only for another model, batch size, `num_iter`, number of hidden
    positions or kind of order, and for guidance on or off or on another interval.

    Args:
      config: the model.
      params: its parameters.
      labels: the class of every image, or weights of the classes (see `Backbone.class_latent`).
      sample_indices: the global number of every image; with `seed` it fixes all randomness.
      settings: how to sample.
      seed: of the orders and indices.
      orders: orders to use in place of those of `settings.order`; the last entry is revealed first.
        Confidence order does not look at them.
      known: of images that are edited; None draws whole images.
      preview: called during sampling with the steps done, their number, and the indices, where
        hidden positions have those of `known` or the level nearest 0. The steps then run one by
        one, with a program for every stage in place of one for all.
      preview_every: so many steps, and after the last one.

    Returns:
      Indices in autoencoder order, positions row-major. Where nothing was hidden, those of `known`.
    """
    num_hidden = config.positions if known is None else known.num_hidden
    hidden = hidden_counts(num_hidden, settings.num_iter)
    scales = guidance_scales(config.positions, settings, num_hidden)
    run: Callable[..., Int[Array, "B L C"]] = _generate
    if preview is not None:
        run = functools.partial(_generate_previewed, preview, preview_every)
    return run(
        params,
        labels,
        sample_indices,
        orders,
        np.uint32(seed),
        scales,
        np.float32(settings.temperature),
        None if known is None else (known.indices, known.hidden),
        np.float32(settings.choice_temperature) if settings.order == "confidence" else None,
        config=config,
        hidden=tuple(hidden.tolist()),
        guided=tuple((scales != 1).tolist()),
        num_hidden=num_hidden,
        order=settings.order,
    )


class Slots(NamedTuple):
    """Images in order layout, where revealing is a slice; at hidden slots, `indices` mean nothing.

    Attributes:
      indices: of the positions.
      orders: the positions.
      keys: theirs, for all that is random of them.
    """

    indices: Int[Array, "B L C"]
    orders: Int[Array, "B L"]
    keys: Key[Array, "B L"]


# Hidden slots before and after a step, and its guidance scale.
Step = tuple[Any, Any, Any]


@functools.partial(jax.jit, static_argnames=("config", "hidden", "guided", "num_hidden", "order"))
def _generate(
    params: dict[str, Any],
    labels: Shaped[Array, "B ..."],
    sample_indices: Int[Array, " B"],
    orders: Int[Array, "B L"] | None,
    seed: Integer[Array, ""],
    scales: Float[Array, " steps"],
    temperature: Float[Array, ""],
    known: tuple[Integer[Array, "B L C"], Bool[Array, "B L"]] | None = None,
    choice_temperature: Float[Array, ""] | None = None,
    *,
    config: TokenBridgeConfig,
    hidden: tuple[int, ...],
    guided: tuple[bool, ...],
    num_hidden: int | None = None,
    order: str = "random",
) -> Int[Array, "B L C"]:
    slots = _first_slots(seed, sample_indices, orders, known, config=config, order=order)
    # Cast and cut once, not at every step.
    params = prepare_params(params, config)
    num_hidden = config.positions if num_hidden is None else num_hidden
    hidden_now, hidden_next = jnp.array([(num_hidden, *hidden[:-1]), hidden], jnp.int32)
    first = 0
    for stage in _plan(config, hidden, guided, num_hidden, order):
        of = np.s_[first : first + stage.steps]
        steps = hidden_now[of], hidden_next[of], scales[of]
        reveal = _make_reveal(config, params, labels, slots, stage, temperature, choice_temperature)
        slots, _ = jax.lax.scan(reveal, slots, steps)
        first += stage.steps
    return _row_major(slots)


def _generate_previewed(
    preview: Preview,
    every: int,
    params: dict[str, Any],
    labels: Shaped[Array | np.ndarray, "B ..."],
    sample_indices: Int[Array | np.ndarray, " B"],
    orders: Int[Array, "B L"] | None,
    seed: np.uint32,
    scales: Float[np.ndarray, " steps"],
    temperature: np.float32,
    known: tuple[Any, Any] | None,
    choice_temperature: np.float32 | None,
    *,
    config: TokenBridgeConfig,
    hidden: tuple[int, ...],
    guided: tuple[bool, ...],
    num_hidden: int,
    order: str,
) -> Int[Array, "B L C"]:
    """As `_generate`, with the loop over the steps on the host."""
    start = jax.jit(_first_slots, static_argnames=("config", "order"))
    slots = start(seed, sample_indices, orders, known, config=config, order=order)
    params = jax.jit(prepare_params, static_argnames="config")(params, config=config)
    stages = _plan(config, hidden, guided, num_hidden, order)
    stage_of_step = [stage for stage in stages for _ in range(stage.steps)]
    hidden_now = (num_hidden, *hidden[:-1])
    for done, stage in enumerate(stage_of_step, 1):
        step = np.int32(hidden_now[done - 1]), np.int32(hidden[done - 1]), scales[done - 1]
        slots = _step(
            params, labels, slots, step, temperature, choice_temperature, config=config, stage=stage
        )
        if done % every == 0 or done == len(hidden):
            shown = _shown(slots, step[1], None if known is None else known[0], config=config)
            preview(done, len(hidden), shown)
    return shown


@functools.partial(jax.jit, static_argnames=("config", "stage"))
def _step(
    params: dict[str, Any],
    labels: Shaped[Array, "B ..."],
    slots: Slots,
    step: Step,
    temperature: Float[Array, ""],
    choice_temperature: Float[Array, ""] | None,
    *,
    config: TokenBridgeConfig,
    stage: Stage,
) -> Slots:
    reveal = _make_reveal(config, params, labels, slots, stage, temperature, choice_temperature)
    return reveal(slots, step)[0]


@functools.partial(jax.jit, static_argnames="config")
def _shown(
    slots: Slots,
    num_hidden: Int[Array, ""],
    background: Integer[Array, "B L C"] | None,
    *,
    config: TokenBridgeConfig,
) -> Int[Array, "B L C"]:
    """The indices, row-major; those of hidden positions are the background's."""
    if background is None:
        behind = jnp.int32(np.argmin(np.abs(config.quantizer.dequantized_levels)))
    else:
        behind = jnp.take_along_axis(background, slots.orders[:, :, None], axis=1)
    hidden = (jnp.arange(config.positions) < num_hidden)[None, :, None]
    return _row_major(slots._replace(indices=jnp.where(hidden, behind, slots.indices)))


def _plan(
    config: TokenBridgeConfig,
    hidden: tuple[int, ...],
    guided: tuple[bool, ...],
    num_hidden: int,
    order: str,
) -> tuple[Stage, ...]:
    most = MAX_STAGES_SCANNED if config.scan_layers else MAX_STAGES
    draw_all = order == "confidence"
    return plan_stages(
        config.positions, hidden, guided, most, num_hidden=num_hidden, draw_all=draw_all
    )


def _first_slots(
    seed: Integer[Array, ""],
    sample_indices: Int[Array, " B"],
    orders: Int[Array, "B L"] | None,
    known: tuple[Integer[Array, "B L C"], Bool[Array, "B L"]] | None,
    *,
    config: TokenBridgeConfig,
    order: str,
) -> Slots:
    """The images before the first step."""
    if orders is None:
        orders = make_orders(order, seed, sample_indices, config.positions)
    if known is None:
        indices = jnp.zeros((*orders.shape, config.channels), jnp.int32)
    else:
        indices, hidden = known
        orders = hidden_first(orders, hidden)
        indices = jnp.where(hidden[:, :, None], 0, indices.astype(jnp.int32))
        indices = jnp.take_along_axis(indices, orders[:, :, None], axis=1)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
        sample_keys(seed, sample_indices)[:, 1], orders
    )
    return Slots(indices, orders, keys)


def _row_major(slots: Slots) -> Int[Array, "B L C"]:
    return jnp.take_along_axis(slots.indices, jnp.argsort(slots.orders)[:, :, None], axis=1)


def _make_reveal(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Shaped[Array, "B ..."],
    slots: Slots,
    stage: Stage,
    temperature: Float[Array, ""],
    choice_temperature: Float[Array, ""] | None,
) -> Callable[[Slots, Step], tuple[Slots, None]]:
    """A step of a stage, to be scanned: `(slots, step) -> slots, None`.

    With a `choice_temperature` in confidence order, otherwise in the order of `slots`.
    """
    by_confidence = choice_temperature is not None
    batch, positions = slots.orders.shape
    # Nothing is differentiated, so there is nothing to rematerialise.
    model = TokenBridge(dataclasses.replace(config, remat="none"), unrolled=True)

    def apply(method: Callable[..., Any], *arguments: Any) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    # Class and null branches go through the backbone as one batch of 2B, side by side: an
    # image's two branches stay on one device.
    copies = 2 if stage.guided else 1
    repeat = functools.partial(jnp.repeat, repeats=copies, axis=0)
    both_labels, both_orders = repeat(labels), repeat(slots.orders)
    drop_class = jnp.arange(len(both_labels)) % copies == 1

    def reveal(slots: Slots, step: Step) -> tuple[Slots, None]:
        hidden_now, hidden_next, scale = step
        window = Window(jnp.maximum(hidden_now - stage.reveals, 0), stage.reveals)
        feature = apply(
            TokenBridge.features,
            repeat(slots.indices[:, positions - stage.visible_slots :]),
            both_labels,
            repeat(slots.orders) if by_confidence else both_orders,
            hidden_now,
            drop_class,
            window,
        )
        if stage.guided:
            # In float32: a difference of near equals is about to be magnified.
            branches = feature.astype(jnp.float32).reshape(batch, copies, *feature.shape[1:])
            conditional, null = branches[:, 0], branches[:, 1]
            feature = null + scale * (conditional - null)
        keys = window.cut(slots.keys)
        slot = window.start + jnp.arange(window.size)
        if by_confidence:
            drawn, log_probs = apply(TokenBridge.sample_with_log_probs, feature, keys, temperature)
            revealed = slot < hidden_now
        else:
            drawn = apply(TokenBridge.sample_positions, feature, keys, temperature)
            revealed = (slot >= hidden_next) & (slot < hidden_now)
        updated = jnp.where(revealed[None, :, None], drawn, window.cut(slots.indices))
        slots = slots._replace(
            indices=jax.lax.dynamic_update_slice_in_dim(slots.indices, updated, window.start, 1)
        )
        if choice_temperature is not None:
            # All that is hidden was drawn. What is most certain goes behind the rest of it, to the
            # slots that this step reveals; what was visible before stays where it is.
            certainty = log_probs + choice_temperature * _choice_noise(keys, config.channels)
            certainty = jnp.where(revealed[None], certainty, jnp.inf)
            padding = ((0, 0), (0, positions - window.size))
            rank = jnp.argsort(jnp.pad(certainty, padding, constant_values=jnp.inf), axis=1)
            slots = jax.tree.map(jax.vmap(lambda x, rank: x[rank]), slots, Slots(rank, rank, rank))
        return slots, None

    return reveal


def _choice_noise(keys: Key[Array, "B R"], channels: int) -> Float[Array, "B R"]:
    """Gumbel noise for every position; channels take the numbers below `channels` of its key."""
    draw = lambda key: jax.random.gumbel(jax.random.fold_in(key, channels))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(keys)


def prepare_params(params: dict[str, Any], config: TokenBridgeConfig) -> dict[str, Any]:
    """Parameters for an unrolled model, in the dtype that the modules cast them to at every use.

    All are cast to `config.dtype` but those of norms, `z_proj` and the classifiers' bias.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        exact = "norm" in name or "z_proj" in name or name.endswith("classifier/bias")
        return leaf if exact else leaf.astype(config.dtype)

    return unstack(jax.tree_util.tree_map_with_path(cast, params))
