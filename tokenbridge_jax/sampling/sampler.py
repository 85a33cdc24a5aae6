"""Sampling: positions are revealed over `num_iter` steps in some order, as one jitted program.

1. All L positions are hidden, or M of them where an image is edited. Every image has an order of
   its positions, with the hidden ones first.
2. Step s leaves `hidden_counts(...)[s]` positions hidden: the backbone looks at what is visible,
   and the head, which also applies guidance, draws the values of the positions that this step
   reveals.
3. After the last step nothing is hidden.

With `guidance_every` above 1, only some steps run the null branch. They compute the features of all
slots and keep the difference between the two branches for the steps after them.

In *confidence* order (paper, figure 8) the head draws all hidden positions at every step, and the
step reveals those whose drawn indices are most likely.

Steps with about equally many visible positions run as one *stage*, a loop whose encoder and head
are as large as the largest of these steps needs (see `schedule.make_plan`). The number of steps in
a stage is fixed in the program that draws whole images. It is an argument of the program that
edits, so one program serves many masks.

All randomness of an image follows from the seed and the image's sample index. The randomness of
one index depends on its position and channel as well. Batch size, device count and the number of
positions revealed together do not matter. They can change only how products are rounded, which
decides a draw of indices only where two levels are equally good to that rounding. Latents differ by
rounding.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.model import TokenBridge, prepare_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.orders import hidden_first, make_orders, sample_keys
from tokenbridge_jax.sampling.schedule import (
    MAX_STAGES,
    Plan,
    SamplingSettings,
    Stage,
    guidance_scales,
    make_plan,
    null_steps,
)
from tokenbridge_jax.transformer import Window

# A GPU draws so few images by programs of so many stages, which compile quickly; see
# docs/performance.md.
FEW_IMAGES, FEW_STAGES = 8, 2


class Known(NamedTuple):
    """What is known of images that are edited; arrays may be numpy's.

    Attributes:
      values: indices, or the latents of a model of latents, in autoencoder order, positions
        row-major. At hidden positions they have no effect on the result; previews show them there.
      hidden: the positions to draw, equally many in every image.
      num_hidden: M, their number in an image.
    """

    values: Shaped[Array, "B L C"]
    hidden: Bool[Array, "B L"]
    num_hidden: int


class Request(NamedTuple):
    """The images to draw; arrays may be numpy's.

    Attributes:
      labels: the class of every image, or weights of the classes (see `Backbone.class_latent`).
      sample_indices: the global number of every image; with `seed` it fixes all randomness.
      seed: of the orders and indices.
      orders: orders to use in place of those of `settings.order`; the last entry is revealed first.
        Confidence order ignores them.
      known: of images that are edited; None draws whole images.
    """

    labels: Int[Array, " B"] | Float[Array, "B classes"]
    sample_indices: Int[Array, " B"]
    seed: int | Any = 0
    orders: Int[Array, "B L"] | None = None
    known: Known | None = None


class Step(NamedTuple):
    """What a program is told of a step, or of all steps as arrays with one entry for each.

    Attributes:
      hidden_now: hidden slots before the step.
      hidden_next: hidden slots after it.
      scale: of guidance.
      temperature: as `SamplingSettings` has it.
      choice_temperature: likewise; None without confidence order.
      runs_null: whether the null branch runs; None if it does in every step with guidance.
    """

    hidden_now: Any
    hidden_next: Any
    scale: Any
    temperature: Any
    choice_temperature: Any
    runs_null: Any


class Slots(NamedTuple):
    """Images in order layout, where revealing is a slice.

    Attributes:
      values: of the positions; meaningless in hidden slots.
      orders: the positions.
      keys: one for all randomness of a position.
      differences: what the class added to the features when the null branch last ran; None if it
        runs in every step with guidance.
    """

    values: Shaped[Array, "B L C"]
    orders: Int[Array, "B L"]
    keys: Key[Array, "B L"]
    differences: Float[Array, "B L D"] | None


def generate(
    config: TokenBridgeConfig, params: dict[str, Any], request: Request, settings: SamplingSettings
) -> Shaped[Array, "B L C"]:
    """Samples the indices of whole images (paper section 3.3), or the hidden ones of `known`.

    The program is compiled anew only for another model, batch size, `num_iter` or kind of order,
    for guidance on or off, on another interval or no longer in every step, and where `known` hides
    up to an eighth, a quarter, half, or all of the positions.

    Args:
      config: the model.
      params: its parameters.
      request: the images to draw.
      settings: how to sample.

    Returns:
      Indices, or the latents of a model of latents, in autoencoder order, positions row-major.
      Where nothing was hidden, those of `known`.

    Raises:
      UserError: confidence order needs probabilities, which the head does not give.
    """
    program, arguments, static = _program(config, request, settings)
    return program(params, *arguments, **static)


def lower(
    config: TokenBridgeConfig, params: dict[str, Any], request: Request, settings: SamplingSettings
) -> jax.stages.Lowered:
    """The program of `generate`, for arguments that may be abstract, before it is compiled.

    Once it is compiled, JAX uses it for later calls of `generate` in the same context.
    """
    program, arguments, static = _program(config, request, settings)
    return program.lower(params, *arguments, **static)


def _program(
    config: TokenBridgeConfig, request: Request, settings: SamplingSettings
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The jitted function that draws a request; its arguments without `params`; static ones."""
    quick = _is_quick(request)
    request, plan, steps = _prepare(config, request, settings, quick)
    static: dict[str, Any] = dict(config=config, stages=plan.stages, order=settings.order)
    if request.known is None:
        return _generate[quick], (request, steps, plan.ends), static
    # As many entries for every number of steps.
    unused = settings.num_iter - len(steps.scale)
    steps = jax.tree.map(lambda x: np.pad(x, (0, unused)), steps)
    return _edit[quick], (request, steps, np.array(plan.ends, np.int32)), static


def generate_steps(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    request: Request,
    settings: SamplingSettings,
    every: int = 1,
) -> Iterator[tuple[int, int, Shaped[Array, "B L C"]]]:
    """As `generate`, but shows the images after every few steps.

    The steps run one by one, with a program for every stage in place of one for all.

    Args:
      config, params, request, settings: as for `generate`.
      every: number of steps between two results; there is always one after the last step.

    Yields:
      The steps done, the number of all steps, and the indices. Hidden positions have the indices of
      `known`, or the level nearest 0. The last indices are the result of `generate`.
    """
    quick = _is_quick(request)
    request, plan, steps = _prepare(config, request, settings, quick)
    slots = jax.jit(_first_slots, static_argnums=(0, 1))(config, settings.order, request, steps)
    params = jax.jit(prepare_params, static_argnames="config")(params, config=config)
    count = len(steps.scale)
    for i in range(count):
        step = jax.tree.map(lambda x, i=i: x[i], steps)
        stage = plan.stages[bisect.bisect(plan.ends, i)]
        slots = _step[quick](config, params, request.labels, stage, step, slots)
        if (i + 1) % every == 0 or i + 1 == count:
            yield i + 1, count, _shown(config, slots, step.hidden_next, request.known)


def _prepare(
    config: TokenBridgeConfig, request: Request, settings: SamplingSettings, quick: bool
) -> tuple[Request, Plan, Step]:
    """The request as the programs take it, and what they do, step by step."""
    num_hidden = None if request.known is None else request.known.num_hidden
    most_stages = FEW_STAGES if quick else MAX_STAGES
    plan = make_plan(config.positions, settings, num_hidden, most_stages)
    scales = guidance_scales(config.positions, settings, num_hidden)
    hidden = np.array(plan.hidden, np.int32)
    temperature, choice_temperature = (
        np.full(len(scales), value, np.float32)
        for value in (settings.temperature, settings.choice_temperature)
    )
    by_confidence = settings.order == "confidence"
    check_order(config, settings)
    steps = Step(
        hidden[:-1],
        hidden[1:],
        scales,
        temperature,
        choice_temperature if by_confidence else None,
        null_steps(config.positions, settings, num_hidden) if settings.guidance_every > 1 else None,
    )
    return request._replace(seed=np.uint32(request.seed)), plan, steps


def check_order(config: TokenBridgeConfig, settings: SamplingSettings) -> None:
    """Raises `UserError` if the head does not give the probabilities that the order needs."""
    if settings.order == "confidence" and not config.has_probabilities:
        raise UserError(
            f"sampling.order='confidence' needs probabilities, which model.head='{config.head}' "
            "does not give; choose another order"
        )


def _draw(
    params: dict[str, Any],
    request: Request,
    steps: Step,
    ends: Any,
    *,
    config: TokenBridgeConfig,
    stages: tuple[Stage, ...],
    order: str,
) -> Shaped[Array, "B L C"]:
    """All steps, stage by stage; `ends` are the steps done at the end of each stage."""
    slots = _first_slots(config, order, request, steps)
    # Cast and cut once, not at every step.
    params = prepare_params(params, config)
    first: Any = 0
    for stage, end in zip(stages, ends, strict=True):

        def body(i: Any, slots: Slots, stage: Stage = stage) -> Slots:
            step = jax.tree.map(lambda x: x[i], steps)
            return _reveal(config, params, request.labels, stage, step, slots)

        slots = jax.lax.fori_loop(first, end, body, slots)
        first = end
    return _row_major(slots)


def _programs(function: Callable[..., Any], *static_argnames: str) -> tuple[Any, Any]:
    """The jitted function, and another one that XLA compiles in less time for GPUs.

    Without Triton's products there are fewer variants to compile and to time.
    """
    options = None, {"xla_gpu_enable_triton_gemm": False}
    jit = functools.partial(jax.jit, function, static_argnames=static_argnames)
    usual, quick = (jit(compiler_options=option) for option in options)
    return usual, quick


def _is_quick(request: Request) -> bool:
    """Whether the time of compiling matters more than a tenth of the speed.

    Only measured on GPUs. Within another program JAX refuses compiler options.
    """
    is_few = jax.default_backend() == "gpu" and request.labels.shape[0] <= FEW_IMAGES
    return is_few and not isinstance(jnp.zeros(()), jax.core.Tracer)


_generate = _programs(_draw, "ends", "config", "stages", "order")
_edit = _programs(_draw, "config", "stages", "order")


def _first_slots(config: TokenBridgeConfig, order: str, request: Request, steps: Step) -> Slots:
    """The images before the first step."""
    orders = request.orders
    if orders is None:
        orders = make_orders(order, request.seed, request.sample_indices, config.positions)
    if request.known is None:
        values = jnp.zeros((*orders.shape, config.channels), config.value_dtype)
    else:
        hidden = request.known.hidden
        orders = hidden_first(orders, hidden)
        known = request.known.values.astype(config.value_dtype)
        values = jnp.where(hidden[:, :, None], 0, known)
        values = jnp.take_along_axis(values, orders[:, :, None], axis=1)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
        sample_keys(request.seed, request.sample_indices)[:, 1], orders
    )
    shape = *orders.shape, config.decoder_width
    return Slots(values, orders, keys, None if steps.runs_null is None else jnp.zeros(shape))


def _reveal(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[Array, " B"] | Float[Array, "B classes"],
    stage: Stage,
    step: Step,
    slots: Slots,
) -> Slots:
    """One step: in confidence order if it has a `choice_temperature`, else in that of `slots`."""
    window = Window(jnp.maximum(step.hidden_now - stage.reveals, 0), stage.reveals)
    feature, guidance, differences = _features(config, params, labels, stage, step, slots, window)
    slots = slots._replace(differences=differences)
    keys = window.cut(slots.keys)
    slot = window.start + jnp.arange(window.size)
    revealed = slot < step.hidden_now
    if step.choice_temperature is None:
        revealed &= slot >= step.hidden_next
    drawn, log_probs = _apply(
        config, params, TokenBridge.sample_positions, feature, keys, step.temperature, guidance
    )
    updated = jnp.where(revealed[None, :, None], drawn, window.cut(slots.values))
    slots = slots._replace(
        values=jax.lax.dynamic_update_slice_in_dim(slots.values, updated, window.start, 1)
    )
    if step.choice_temperature is not None:
        # Every hidden slot was drawn. The most certain ones move behind the others, to the slots
        # that this step reveals; visible slots stay where they are. (NaN would sort behind all.)
        certainty = log_probs + step.choice_temperature * _choice_noise(keys, config.channels)
        certainty = jnp.where(revealed[None], jnp.nan_to_num(certainty), jnp.inf)
        padding = ((0, 0), (0, config.positions - window.size))
        rank = jnp.argsort(jnp.pad(certainty, padding, constant_values=jnp.inf), axis=1)
        reorder = jax.vmap(lambda x, rank: x[rank])
        slots = jax.tree.map(lambda x: reorder(x, rank), slots)
    return slots


def _features(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[Array, " B"] | Float[Array, "B classes"],
    stage: Stage,
    step: Step,
    slots: Slots,
    window: Window,
) -> tuple[Float[Array, "B W D"], Guidance | None, Float[Array, "B L D"] | None]:
    """What the head draws the window from, and the slots' differences after the step."""
    batch, positions = slots.orders.shape

    def branches(copies: int, window: Window | None) -> list[jax.Array]:
        """Features of the class; with two copies of the images also those without one."""
        # Both go through the backbone as one batch of 2B, side by side: an image's two branches
        # stay on one device.
        repeat = functools.partial(jnp.repeat, repeats=copies, axis=0)
        features = _apply(
            config,
            params,
            TokenBridge.features,
            repeat(slots.values[:, positions - stage.visible_slots :]),
            repeat(labels),
            repeat(slots.orders),
            step.hidden_now,
            jnp.arange(copies * batch) % copies == 1,
            window,
        )
        features = features.reshape(batch, copies, *features.shape[1:])
        return [features[:, copy] for copy in range(copies)]

    if not stage.guided:
        return branches(1, window)[0], None, slots.differences
    if step.runs_null is None:
        feature, null = branches(2, window)
        return feature, Guidance(null, step.scale), None

    def run_null() -> tuple[jax.Array, jax.Array]:
        feature, null = branches(2, None)
        # In float32, because guidance is about to magnify it.
        return window.cut(feature), feature.astype(jnp.float32) - null.astype(jnp.float32)

    def skip_null() -> tuple[jax.Array, jax.Array | None]:
        return branches(1, window)[0], slots.differences

    feature, differences = jax.lax.cond(step.runs_null, run_null, skip_null)
    return feature, Guidance(feature - window.cut(differences), step.scale), differences


def _apply(
    config: TokenBridgeConfig, params: dict[str, Any], method: Callable[..., Any], *arguments: Any
) -> Any:
    # Nothing is differentiated, so there is nothing to rematerialise.
    model = TokenBridge(dataclasses.replace(config, remat="none"), sampling=True)
    return model.apply({"params": params}, *arguments, method=method)


_step = _programs(_reveal, "config", "stage")


def _choice_noise(keys: Key[Array, "B R"], channels: int) -> Float[Array, "B R"]:
    """Gumbel noise for every position; channels take the numbers below `channels` of its key."""
    draw = lambda key: jax.random.gumbel(jax.random.fold_in(key, channels))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(keys)


@functools.partial(jax.jit, static_argnames="config")
def _shown(
    config: TokenBridgeConfig, slots: Slots, num_hidden: Int[Array, ""], known: Known | None
) -> Shaped[Array, "B L C"]:
    """The values, row-major; hidden positions have those of `known`, or the one nearest 0."""
    if known is None:
        behind = jnp.asarray(config.quantizer.blank, config.value_dtype)
    else:
        behind = jnp.take_along_axis(known.values, slots.orders[:, :, None], axis=1)
    hidden = (jnp.arange(config.positions) < num_hidden)[None, :, None]
    return _row_major(slots._replace(values=jnp.where(hidden, behind, slots.values)))


def _row_major(slots: Slots) -> Shaped[Array, "B L C"]:
    return jnp.take_along_axis(slots.values, jnp.argsort(slots.orders)[:, :, None], axis=1)
