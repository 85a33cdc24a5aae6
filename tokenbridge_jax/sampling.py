"""Sampling: positions revealed over `num_iter` steps in a random order, as one jitted program.

1. All L positions are hidden; every image draws an order of its positions.
2. Step s leaves `hidden_counts(...)[s]` positions hidden: the backbone looks at what is visible,
   guidance mixes its class and null features, and the head draws the indices of the positions
   revealed in this step.
3. After the last step nothing is hidden.

Steps with about equally many visible positions run as one *stage*, a scan whose encoder and head
are as large as the largest of them needs (see `plan_stages`).

All randomness of an image follows from the seed and the image's sample index, and that of one
index from its position and channel besides: neither batch size nor device count nor the number of
positions revealed together enters it. What they can change is the rounding of products, which
decides a draw only where two levels are equally good to that rounding.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key
from ml_collections import ConfigDict

from tokenbridge_jax.errors import UserError
from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig
from tokenbridge_jax.transformer import Window, unstack

GUIDANCE_SCHEDULES = ("linear", "constant")
# Stages of a program at most: each has all layers of its own, and a model that scans its layers
# wants to compile soon.
MAX_STAGES, MAX_STAGES_SCANNED = 8, 2
# Rows of a bfloat16 tile, on TPU and for tensor cores alike.
TILE = 16


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to sample.

    Attributes:
      num_iter: reveal steps; the paper's figures use 256.
      guidance: scale of classifier-free guidance, on the backbone's features; 1 turns it off and
        saves the null branch.
      guidance_schedule: "linear", from 1 with everything hidden to `guidance`, or "constant".
      temperature: divides the head's logits; 0 takes the most likely level.
      guidance_interval: guidance acts in steps that find at least the first and less than the
        second share of the positions revealed; elsewhere its scale is 1, which saves the null
        branch. The default is all steps; anything else samples from another distribution.

    Raises:
      UserError: on construction, if a setting is out of range.
    """

    num_iter: int = 64
    guidance: float = 1.0
    guidance_schedule: str = "linear"
    temperature: float = 1.0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)

    @classmethod
    def from_section(cls, section: ConfigDict, **changes: Any) -> "SamplingSettings":
        """The settings of `config.sampling`, which also holds a batch size, with some changed."""
        given = {name: value for name, value in section.items() if name != "batch_size"}
        return cls(**given | changes)

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
        interval = self.guidance_interval
        if not _is_interval(interval):
            raise UserError(
                f"sampling.guidance_interval={interval} must be two shares, 0 <= from < to <= 1"
            )


def _is_interval(value: Any) -> bool:
    try:
        low, high = value
        return bool(0 <= low < high <= 1)
    except (TypeError, ValueError):
        return False


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
        scales = np.full(len(hidden), settings.guidance)
    else:
        # The reference still counts one hidden position at the last step.
        revealed = positions - np.maximum(hidden, 1)
        scales = 1 + (settings.guidance - 1) * revealed / positions
    visible = (positions - np.array([positions, *hidden[:-1]])) / positions
    low, high = settings.guidance_interval
    return np.where((low <= visible) & (visible < high), scales, 1).astype(np.float32)


class Stage(NamedTuple):
    """Consecutive steps that run as one scan.

    Attributes:
      steps: how many.
      visible_slots: S, the most that goes to the encoder in one of them.
      reveals: R, the most positions that are revealed in one of them.
      guided: whether they need the null branch.
    """

    steps: int
    visible_slots: int
    reveals: int
    guided: bool


def plan_stages(
    positions: int, hidden: tuple[int, ...], guided: tuple[bool, ...], most: int = MAX_STAGES
) -> tuple[Stage, ...]:
    """Puts the steps together whose visible positions fill the same number of eighths of all L.

    Of the matmul FLOPs of size L with guidance, padding is then 3.0% more at 256 steps and 4.1% at
    64, where the best of all ways to make eight stages would have 3.0% and 2.9%; in two stages it
    is 12.4% and 17.4%. Slots come in
    whole tiles, so a model of at most 16 positions has one stage and compiles the faster.

    Args:
      positions: L.
      hidden: how many positions are hidden after each step.
      guided: which steps need the null branch.
      most: in place of eighths, so many parts.
    """
    tile = max(TILE, -(-positions // most))
    before = (positions, *hidden[:-1])

    def sizes(step: int) -> tuple[int, bool]:
        visible = max(positions - before[step], 1)
        return min(-(-visible // tile) * tile, positions), guided[step]

    stages = []
    for (visible_slots, is_guided), group in itertools.groupby(range(len(hidden)), sizes):
        reveals = [before[step] - hidden[step] for step in group]
        stages.append(Stage(len(reveals), visible_slots, max(reveals), is_guided))
    return tuple(stages)


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
    on or off or on another interval.

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
    hidden = hidden_counts(config.positions, settings.num_iter)
    scales = guidance_scales(config.positions, settings)
    return _generate(
        params,
        labels,
        sample_indices,
        orders,
        np.uint32(seed),
        scales,
        np.float32(settings.temperature),
        config=config,
        hidden=tuple(hidden.tolist()),
        guided=tuple((scales != 1).tolist()),
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
    guided: tuple[bool, ...],
) -> Int[Array, "B L C"]:
    if orders is None:
        orders = random_orders(seed, sample_indices, config.positions)
    batch, positions = orders.shape
    index_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
        _sample_keys(seed, sample_indices)[:, 1], orders
    )
    # Cast and cut once, not at every step.
    variables = {"params": prepare_params(params, config)}
    # Nothing is differentiated, so there is nothing to rematerialise.
    model = TokenBridge(dataclasses.replace(config, remat="none"), unrolled=True)

    def apply(method: Callable[..., Any], *arguments: Any) -> Any:
        return model.apply(variables, *arguments, method=method)

    def run_stage(
        indices: Int[Array, "B L C"], stage: Stage, steps: tuple[jax.Array, jax.Array, jax.Array]
    ) -> Int[Array, "B L C"]:
        # Class and null branches go through the backbone as one batch of 2B, side by side: an
        # image's two branches stay on one device.
        copies = 2 if stage.guided else 1
        repeat = functools.partial(jnp.repeat, repeats=copies, axis=0)
        both_labels, both_orders = repeat(labels), repeat(orders)
        drop_class = jnp.arange(len(both_labels)) % copies == 1

        def reveal(
            indices: Int[Array, "B L C"], step: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[Int[Array, "B L C"], None]:
            hidden_now, hidden_next, scale = step
            window = Window(jnp.maximum(hidden_now - stage.reveals, 0), stage.reveals)
            visible = repeat(indices[:, positions - stage.visible_slots :])
            feature = apply(
                TokenBridge.features,
                visible,
                both_labels,
                both_orders,
                hidden_now,
                drop_class,
                window,
            )
            if stage.guided:
                # In float32: a difference of near equals is about to be magnified.
                branches = feature.astype(jnp.float32).reshape(batch, copies, *feature.shape[1:])
                conditional, null = branches[:, 0], branches[:, 1]
                feature = null + scale * (conditional - null)
            keys = window.cut(index_keys)
            drawn = apply(TokenBridge.sample_positions, feature, keys, temperature)
            slot = window.start + jnp.arange(window.size)
            revealed = ((slot >= hidden_next) & (slot < hidden_now))[None, :, None]
            updated = jnp.where(revealed, drawn, window.cut(indices))
            return jax.lax.dynamic_update_slice_in_dim(indices, updated, window.start, 1), None

        return jax.lax.scan(reveal, indices, steps)[0]

    # In order layout until the end: revealing is then a slice. Hidden entries are never looked at.
    indices = jnp.zeros((batch, positions, config.channels), jnp.int32)
    hidden_now, hidden_next = jnp.array([(positions, *hidden[:-1]), hidden], jnp.int32)
    first = 0
    most = MAX_STAGES_SCANNED if config.scan_layers else MAX_STAGES
    for stage in plan_stages(positions, hidden, guided, most):
        of = np.s_[first : first + stage.steps]
        steps = hidden_now[of], hidden_next[of], scales[of]
        indices = run_stage(indices, stage, steps)
        first += stage.steps
    return jnp.take_along_axis(indices, jnp.argsort(orders)[:, :, None], axis=1)


def prepare_params(params: dict[str, Any], config: TokenBridgeConfig) -> dict[str, Any]:
    """Parameters for an unrolled model, in the dtype that the modules cast them to at every use.

    All are cast to `config.dtype` but those of norms, `z_proj` and the classifiers' bias.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        exact = "norm" in name or "z_proj" in name or name.endswith("classifier/bias")
        return leaf if exact else leaf.astype(config.dtype)

    return unstack(jax.tree_util.tree_map_with_path(cast, params))
