"""The reference's AdamW: clip by global norm, decay by leaf name, warm-up + cosine.

Order of operations in one update: gradients are clipped, Adam's moments are updated, decay is
added, the result is scaled by the learning rate of that update.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Names of biases and of the scales of norms: one number for each feature, which decay would only
# move away from 0 or 1. Everything else decays: matrices, embeddings, mask token, null latent.
# The name decides, not the rank, because layers are stacked: a bias of a scanned layer has rank 2.
NO_DECAY_NAMES = ("bias", "scale")

ADAM_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      learning_rate: the peak.
      total_steps: updates in the whole run; the cosine ends there at 0.
      warmup_steps: the learning rate rises linearly from 0 over these updates.
      schedule: "cosine" or "constant", after the warm-up.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      weight_decay: decoupled, multiplied by the learning rate as in AdamW.
      clip: largest global norm of the gradient; 0 does not clip.
      decay_head: whether the parameters of a model's head decay.
      discriminator_rate: of an autoencoder's discriminator, relative to the learning rate.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.02
    clip: float = 1.0
    decay_head: bool = True
    discriminator_rate: float = 1.0


class RunNumbers(NamedTuple):
    """Numbers of a run that its compiled step takes as arguments: scalars of numpy or JAX.

    So runs that differ in these alone share their compiled programs.

    Attributes:
      seed: uint32, for the random choices of examples and for dropout.
      learning_rate: float32, as in `OptimizerConfig`.
      warmup_steps: int32, likewise.
      total_steps: int32, likewise.
    """

    seed: Any
    learning_rate: Any
    warmup_steps: Any
    total_steps: Any

    @classmethod
    def of(cls, config: OptimizerConfig, seed: int) -> "RunNumbers":
        """Those of a run, as numpy scalars."""
        return cls(
            np.uint32(seed),
            np.float32(config.learning_rate),
            np.int32(config.warmup_steps),
            np.int32(config.total_steps),
        )


def learning_rate_schedule(kind: str, numbers: RunNumbers | OptimizerConfig) -> optax.Schedule:
    """Updates done so far -> learning rate of the next update; `kind` is `config.schedule`.

    With t updates done, peak p, w warm-up and n total updates: p t / w while t < w, then p, or
    p (1 + cos(pi (t - w) / (n - w))) / 2. (`optax.warmup_cosine_decay_schedule` and
    `warmup_constant_schedule` need their numbers before a step is compiled.)
    """
    peak, warmup, total = numbers.learning_rate, numbers.warmup_steps, numbers.total_steps

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = peak * step / jnp.maximum(warmup, 1)
        if kind == "constant":
            falling = jnp.full_like(step, peak)
        else:
            progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0.0, 1.0)
            falling = peak * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return schedule


def clip_by_global_norm(clip: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, clip / (norm + 1e-6)), the reference's rule.

    Optax divides by the norm alone, and only if it is above the limit.
    """

    def clipped(gradients: Any, params: Any) -> Any:
        del params
        scale = jnp.minimum(1.0, clip / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda gradient: gradient * scale, gradients)

    return optax.stateless(clipped)


def decay_mask(params: Any, decay_head: bool = True) -> Any:
    """True for the leaves that decay: all but those named in `NO_DECAY_NAMES`, and the head's."""

    def decays(path: Any, leaf: Any) -> bool:
        del leaf
        return path[-1].key not in NO_DECAY_NAMES and (decay_head or path[0].key != "head")

    return jax.tree.map_with_path(decays, params)


def _scale_discriminator(
    scaling: optax.GradientTransformation, factor: float
) -> optax.GradientTransformation:
    """Multiplies the updates of the discriminator; the state stays as it is."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = scaling.update(updates, state, params)
        scaled = jax.tree.map(lambda update: factor * update, updates["discriminator"])
        return {**updates, "discriminator": scaled}, state

    return optax.GradientTransformation(scaling.init, update)


def make_optimizer(
    config: OptimizerConfig, numbers: RunNumbers | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation of one update, and its learning rate schedule.

    `numbers` take the place of those of the config; they may be arguments of a jitted function.

    Adam, decay and learning rate together are `optax.adamw`, which would put their states one level
    deeper in checkpoints.
    """
    schedule = learning_rate_schedule(config.schedule, config if numbers is None else numbers)
    mask = functools.partial(decay_mask, decay_head=config.decay_head)
    scaling: Any = optax.scale_by_learning_rate(schedule)
    if config.discriminator_rate != 1:
        scaling = _scale_discriminator(scaling, config.discriminator_rate)
    optimizer = optax.chain(
        # Without clipping the state has the same structure: a run may change its clip.
        clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=ADAM_EPS),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        scaling,
    )
    return optimizer, schedule
