"""The sampler's settings, and its steps: what each one reveals, its guidance and its stage."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from tokenbridge_jax.runtime import checks
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.orders import ORDERS

GUIDANCE_SCHEDULES = ("linear", "constant")
# The most stages of a program. Every stage has its own copy of the layers.
MAX_STAGES = 8
# Rows of a bfloat16 tile, both on TPU and for tensor cores.
TILE = 16


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to sample.

    Attributes:
      num_iter: number of reveal steps; the paper's figures use 256. Each reveals a position, so
        there are never more than L: higher numbers draw the same images.
      guidance: scale of classifier-free guidance; 1 turns it off and saves the null branch. The
        head says what it mixes (`Head.sample`).
      guidance_schedule: "linear", from 1 with everything hidden to `guidance`, or "constant".
      temperature: divides the logits of heads of indices; 0 takes the most likely level. Heads of
        latents scale noise by it, each in its own way.
      guidance_interval: guidance acts in steps before which at least the first and less than the
        second share of the positions is revealed. In other steps its scale is 1, which saves the
        null branch. The default is all steps; other values sample from another distribution.
      guidance_every: the null branch runs in every so many steps with guidance. The others take the
        difference that the class made to the features in the last such step (the condition cache of
        LazyMAR, arXiv 2503.12450). The default is every step.
      order: the order in which positions are revealed: "random", "raster", "halton" (evenly over
        the grid), or "confidence" (the most certain next). In confidence order the head draws all
        hidden positions at every step: its work grows by a factor of 2 / pi * `num_iter`, and it
        needs the memory of drawing whole images at once.
      choice_temperature: of the Gumbel noise added to the log-probabilities that confidence order
        compares; 0 takes the most certain positions, higher values choose more randomly.

    Raises:
      UserError: on construction, if a setting is out of range.
    """

    num_iter: int | Any = 64
    guidance: float | Any = 1.0
    guidance_schedule: str = "linear"
    temperature: float | Any = 1.0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    guidance_every: int | Any = 1
    order: str = "random"
    choice_temperature: float | Any = 1.0

    def to_json(self) -> dict[str, Any]:
        """The settings as values of JSON."""
        return dataclasses.asdict(self) | {"guidance_interval": list(self.guidance_interval)}

    def __post_init__(self) -> None:
        for name in ("num_iter", "guidance_every"):
            checks.at_least(f"sampling.{name}", getattr(self, name), 1)
        for name in ("temperature", "choice_temperature"):
            value = checks.number(f"sampling.{name}", getattr(self, name))
            if value < 0 or not math.isfinite(value):
                raise UserError(f"sampling.{name}={value} must be 0 or more and finite")
        if self.order not in ORDERS:
            raise UserError(f"sampling.order='{self.order}' is not one of {', '.join(ORDERS)}")
        if not math.isfinite(checks.number("sampling.guidance", self.guidance)):
            raise UserError(f"sampling.guidance={self.guidance} must be finite")
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise UserError(
                f"sampling.guidance_schedule='{self.guidance_schedule}' is not one of "
                f"{', '.join(GUIDANCE_SCHEDULES)}"
            )
        try:
            low, high = self.guidance_interval
            is_interval = 0 <= low < high <= 1
        except (TypeError, ValueError):
            is_interval = False
        if not is_interval:
            raise UserError(
                f"sampling.guidance_interval={self.guidance_interval} must be two shares, "
                "0 <= from < to <= 1"
            )


def make_settings(settings: Mapping[str, Any]) -> SamplingSettings:
    """Settings by name.

    Raises:
      UserError: there is no setting of a name, or a value is out of range.
    """
    known = [field.name for field in dataclasses.fields(SamplingSettings)]
    if wrong := [name for name in settings if name not in known]:
        raise UserError(f"{wrong[0]} is no setting of sampling; these are: {', '.join(known)}")
    return SamplingSettings(**settings)


@functools.cache
def hidden_counts(positions: int, num_iter: int) -> np.ndarray:
    """How many positions are still hidden after each step: a cosine that ends in 0.

    Every step reveals at least one position: with more steps than positions, the steps that would
    reveal nothing are left out. The floor is taken in float64, as in the reference.

    Returns:
      int32 array `[steps]`, strictly decreasing, `steps <= num_iter`. It is read-only.
    """
    counts: list[int] = []
    hidden = positions
    for step in range(1, num_iter):
        cosine = math.floor(positions * math.cos(math.pi / 2 * step / num_iter))
        hidden_next = max(1, min(hidden - 1, cosine))
        if hidden_next < hidden:
            counts.append(hidden_next)
        hidden = hidden_next
    result = np.array([*counts, 0], np.int32)
    result.flags.writeable = False
    return result


def guidance_scales(
    positions: int, settings: SamplingSettings, num_hidden: int | None = None
) -> np.ndarray:
    """The guidance scale of every step of `hidden_counts`: float32 array `[steps]`.

    Args:
      positions: L; scales depend on how many of them are visible.
      settings: how to sample.
      num_hidden: M, the number of positions hidden at first; all by default.
    """
    num_hidden = positions if num_hidden is None else num_hidden
    hidden = hidden_counts(num_hidden, settings.num_iter)
    if settings.guidance_schedule == "constant":
        scales = np.full(len(hidden), settings.guidance)
    else:
        # The reference still counts one hidden position at the last step.
        revealed = positions - np.maximum(hidden, 1)
        scales = 1 + (settings.guidance - 1) * revealed / positions
    guided = _guided_steps(positions, settings, num_hidden)
    return np.where(guided, scales, 1).astype(np.float32)


def null_steps(
    positions: int, settings: SamplingSettings, num_hidden: int | None = None
) -> Bool[np.ndarray, " steps"]:
    """Which steps of `hidden_counts` run the null branch; arguments as for `guidance_scales`."""
    num_hidden = positions if num_hidden is None else num_hidden
    guided = _guided_steps(positions, settings, num_hidden)
    return guided & ((np.cumsum(guided) - 1) % settings.guidance_every == 0)


class Stage(NamedTuple):
    """Consecutive steps that run as one loop.

    Attributes:
      visible_slots: S, the largest number of slots that the encoder sees in one of them.
      reveals: R, the largest number of positions that the head draws in one of them. It draws those
        that are revealed, or in confidence order all hidden ones.
      guided: whether they need the null branch.
    """

    visible_slots: int
    reveals: int
    guided: bool


class Plan(NamedTuple):
    """The steps from M hidden positions to none.

    Attributes:
      stages: of the program.
      ends: the number of steps done at the end of each stage.
      hidden: the number of hidden positions before the first step and after every step.
    """

    stages: tuple[Stage, ...]
    ends: tuple[int, ...]
    hidden: tuple[int, ...]


def make_plan(
    positions: int,
    settings: SamplingSettings,
    num_hidden: int | None = None,
    most_stages: int = MAX_STAGES,
) -> Plan:
    """Groups steps whose visible positions fill the same number of eighths of L.

    For size L with guidance, padding adds 3.0% to the matmul FLOPs at 256 steps and 4.1% at 64; the
    best possible eight stages would add 3.0% and 2.9%, two stages 12.4% and 17.4%. Slots come in
    whole tiles, so a model of at most 16 positions has one stage and compiles faster.

    Edits share their stages if they start with up to an eighth, a quarter, half, or all of the
    positions hidden. Such stages are as large as any of these edits needs, and a stage may have no
    steps.

    Args:
      positions: L.
      settings: how to sample.
      num_hidden: M, of an edit; None draws a whole image, which shares its stages with no edit.
      most_stages: with fewer than eight, there are that many parts of L in place of eighths.
    """
    eighth, tile = (max(TILE, -(-positions // most)) for most in (MAX_STAGES, most_stages))
    start = positions if num_hidden is None else num_hidden
    starts = [positions] if num_hidden is None else _similar_starts(num_hidden, positions, eighth)
    # The largest number of positions that a step draws, by the number of visible ones before it.
    reveals: dict[int, int] = {}
    for first in starts:
        counts = (first, *hidden_counts(first, settings.num_iter).tolist())
        for now, after in itertools.pairwise(counts):
            drawn = now if settings.order == "confidence" else now - after
            reveals[positions - now] = max(drawn, reveals.get(positions - now, 0))

    is_guided = _is_guided(np.arange(positions), positions, settings).tolist()

    def sizes(visible: int) -> tuple[int, bool]:
        return min(-(-max(visible, 1) // tile) * tile, positions), is_guided[visible]

    stages, last_visible = [], []
    for (visible_slots, guided), group in itertools.groupby(sorted(reveals), sizes):
        members = list(group)
        stages.append(Stage(visible_slots, max(reveals[visible] for visible in members), guided))
        last_visible.append(members[-1])
    hidden = (start, *hidden_counts(start, settings.num_iter).tolist())
    visible = positions - np.array(hidden[:-1])
    ends = np.searchsorted(visible, last_visible, side="right").tolist()
    return Plan(tuple(stages), tuple(ends), hidden)


def _similar_starts(num_hidden: int, positions: int, tile: int) -> range:
    """The numbers of hidden positions that share a program with `num_hidden`."""
    largest = tile
    while largest < num_hidden:
        largest *= 2
    return range(largest // 2 + 1 if largest > tile else 1, min(largest, positions) + 1)


def _guided_steps(
    positions: int, settings: SamplingSettings, num_hidden: int
) -> Bool[np.ndarray, " steps"]:
    """In which steps guidance acts."""
    before = [num_hidden, *hidden_counts(num_hidden, settings.num_iter)[:-1]]
    return _is_guided(positions - np.array(before), positions, settings)


def _is_guided(
    visible: Integer[np.ndarray, " n"], positions: int, settings: SamplingSettings
) -> Bool[np.ndarray, " n"]:
    """Whether guidance acts in a step, given the number of visible positions before it."""
    low, high = settings.guidance_interval
    share = visible / positions
    return (low <= share) & (share < high) & (np.float32(settings.guidance) != 1)
