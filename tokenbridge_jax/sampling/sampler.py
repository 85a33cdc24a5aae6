"""Sampling: positions revealed over `num_iter` steps in some order, as one jitted program.

1. All L positions are hidden, or of an image that is edited M of them; every image has an order of
   its positions, the hidden ones first.
2. Step s leaves `hidden_counts(...)[s]` positions hidden: the backbone looks at what is visible,
   guidance mixes its class and null features, and the head draws the indices of the positions
   revealed in this step.
3. After the last step nothing is hidden.

In *confidence* order (paper, figure 8) the head draws all that is hidden at every step, and the
positions are revealed whose drawn indices are most likely.

Steps with about equally many visible positions run as one *stage*, a loop whose encoder and head
are as large as the largest of them needs (see `schedule.make_plan`). How many steps a stage has is
part of the program that draws whole images; one that edits is told, so that it serves many masks.

All randomness of an image follows from the seed and the image's sample index, and that of one
index from its position and channel besides: neither batch size nor device count nor the number of
positions revealed together enters it. What they can change is the rounding of products, which
decides a draw only where two levels are equally good to that rounding.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped

from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig
from tokenbridge_jax.sampling.orders import hidden_first, make_orders, sample_keys
from tokenbridge_jax.sampling.schedule import (
    MAX_STAGES,
    MAX_STAGES_SCANNED,
    Plan,
    SamplingSettings,
    Stage,
    guidance_scales,
    make_plan,
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

    The program is compiled anew only for another model, batch size, `num_iter` or kind of order,
    for guidance on or off or on another interval, and where `known` hides up to an eighth, a
    quarter, half, or all of the positions.

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
    num_hidden = None if known is None else known.num_hidden
    most = MAX_STAGES_SCANNED if config.scan_layers else MAX_STAGES
    plan = make_plan(config.positions, settings, num_hidden, most)
    scales = guidance_scales(config.positions, settings, num_hidden)
    arguments = params, labels, sample_indices, orders, np.uint32(seed)
    choice = np.float32(settings.choice_temperature) if settings.order == "confidence" else None
    temperatures = np.float32(settings.temperature), choice
    given = None if known is None else (known.indices, known.hidden)
    static: dict[str, Any] = dict(config=config, order=settings.order)
    if preview is not None:
        return _generate_previewed(
            preview, preview_every, *arguments, scales, *temperatures, given, plan=plan, **static
        )
    if given is None:
        return _generate(*arguments, scales, *temperatures, plan=plan, **static)
    # As many entries for every number of steps.
    unused = settings.num_iter - len(scales)
    hidden = np.pad(np.array(plan.hidden, np.int32), (0, unused))
    scales = np.pad(scales, (0, unused))
    ends = np.array(plan.ends, np.int32)
    return _edit(
        *arguments, scales, *temperatures, given, hidden, ends, stages=plan.stages, **static
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
Reveal = Callable[[Slots, Step], Slots]


@functools.partial(jax.jit, static_argnames=("config", "plan", "order"))
def _generate(
    params: dict[str, Any],
    labels: Shaped[Array, "B ..."],
    sample_indices: Int[Array, " B"],
    orders: Int[Array, "B L"] | None,
    seed: Integer[Array, ""],
    scales: Float[Array, " steps"],
    temperature: Float[Array, ""],
    choice_temperature: Float[Array, ""] | None = None,
    *,
    config: TokenBridgeConfig,
    plan: Plan,
    order: str = "random",
) -> Int[Array, "B L C"]:
    """Whole images."""
    slots = _first_slots(seed, sample_indices, orders, None, config=config, order=order)
    # Cast and cut once, not at every step.
    params = prepare_params(params, config)
    hidden_now, hidden_next = jnp.array([plan.hidden[:-1], plan.hidden[1:]], jnp.int32)
    first = 0
    for stage, end in zip(plan.stages, plan.ends, strict=True):
        steps = hidden_now[first:end], hidden_next[first:end], scales[first:end]
        reveal = _make_reveal(config, params, labels, slots, stage, temperature, choice_temperature)
        slots, _ = jax.lax.scan(lambda *x, reveal=reveal: (reveal(*x), None), slots, steps)
        first = end
    return _row_major(slots)


@functools.partial(jax.jit, static_argnames=("config", "stages", "order"))
def _edit(
    params: dict[str, Any],
    labels: Shaped[Array, "B ..."],
    sample_indices: Int[Array, " B"],
    orders: Int[Array, "B L"] | None,
    seed: Integer[Array, ""],
    scales: Float[Array, " steps"],
    temperature: Float[Array, ""],
    choice_temperature: Float[Array, ""] | None,
    known: tuple[Integer[Array, "B L C"], Bool[Array, "B L"]],
    hidden: Int[Array, " steps+1"],
    ends: Int[Array, " stages"],
    *,
    config: TokenBridgeConfig,
    stages: tuple[Stage, ...],
    order: str,
) -> Int[Array, "B L C"]:
    """As `_generate`, with numbers of steps and of hidden positions that the program is told."""
    slots = _first_slots(seed, sample_indices, orders, known, config=config, order=order)
    params = prepare_params(params, config)
    first: Any = 0
    for stage, end in zip(stages, ends, strict=True):
        reveal = _make_reveal(config, params, labels, slots, stage, temperature, choice_temperature)

        def body(i: Any, slots: Slots, reveal: Reveal = reveal) -> Slots:
            return reveal(slots, (hidden[i], hidden[i + 1], scales[i]))

        slots = jax.lax.fori_loop(first, end, body, slots)
        first = end
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
    choice_temperature: np.float32 | None,
    known: tuple[Any, Any] | None,
    *,
    config: TokenBridgeConfig,
    plan: Plan,
    order: str,
) -> Int[Array, "B L C"]:
    """As `_generate` and `_edit`, with the loop over the steps on the host."""
    start = jax.jit(_first_slots, static_argnames=("config", "order"))
    slots = start(seed, sample_indices, orders, known, config=config, order=order)
    params = jax.jit(prepare_params, static_argnames="config")(params, config=config)
    steps = len(scales)
    for i in range(steps):
        stage = plan.stages[bisect.bisect(plan.ends, i)]
        step = np.int32(plan.hidden[i]), np.int32(plan.hidden[i + 1]), scales[i]
        slots = _step(
            params, labels, slots, step, temperature, choice_temperature, config=config, stage=stage
        )
        if (i + 1) % every == 0 or i + 1 == steps:
            shown = _shown(slots, step[1], None if known is None else known[0], config=config)
            preview(i + 1, steps, shown)
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
    return reveal(slots, step)


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
) -> Reveal:
    """A step of a stage.

    With a `choice_temperature` in confidence order, otherwise in the order of `slots`.
    """
    by_confidence = choice_temperature is not None
    batch, positions = slots.orders.shape
    # Nothing is differentiated, so there is nothing to rematerialise.
    model = TokenBridge(dataclasses.replace(config, remat="none", scan_layers=False))

    def apply(method: Callable[..., Any], *arguments: Any) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    # Class and null branches go through the backbone as one batch of 2B, side by side: an
    # image's two branches stay on one device.
    copies = 2 if stage.guided else 1
    repeat = functools.partial(jnp.repeat, repeats=copies, axis=0)
    both_labels, both_orders = repeat(labels), repeat(slots.orders)
    drop_class = jnp.arange(len(both_labels)) % copies == 1

    def reveal(slots: Slots, step: Step) -> Slots:
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
            # slots that this step reveals; what was visible before stays where it is. (NaN would
            # go behind all of it.)
            certainty = log_probs + choice_temperature * _choice_noise(keys, config.channels)
            certainty = jnp.where(revealed[None], jnp.nan_to_num(certainty), jnp.inf)
            padding = ((0, 0), (0, positions - window.size))
            rank = jnp.argsort(jnp.pad(certainty, padding, constant_values=jnp.inf), axis=1)
            slots = jax.tree.map(jax.vmap(lambda x, rank: x[rank]), slots, Slots(rank, rank, rank))
        return slots

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
