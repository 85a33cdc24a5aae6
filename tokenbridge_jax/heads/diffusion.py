"""MAR's diffusion head (Li et al., 2024, arXiv 2406.11838): a small network denoises a position.

The network predicts the noise in the latents, and where the variance of a reverse step lies between
its bounds (Nichol & Dhariwal, 2021, eq. 15).
"""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from tokenbridge_jax.heads.conditioned_mlp import ConditionedMLP, draw_noise, mixed
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.heads.noise_schedule import NoiseSchedule
from tokenbridge_jax.runtime.errors import UserError

# Of training; sampling takes some of them.
DIFFUSION_STEPS = 1000
# Half the width of a bin of 8-bit data in [-1, 1], which the likelihood of the first step is for.
_HALF_BIN = 1 / 255


class Prediction(NamedTuple):
    """What the network says of noisy latents, float32 `[..., C]`.

    Attributes:
      noise: in them.
      place: of the reverse step's log-variance between its bounds, -1 and 1.
    """

    noise: Array
    place: Array


class DiffusionHead(ConditionedMLP):
    """Draws continuous latents; the steps of sampling are evenly spaced among the 1000 of training.

    Attributes:
      clip: every reverse step clips the latents that it predicts to -clip to clip; 0 is not to
        clip, as MAR. (The first of 100 steps multiplies an error of the prediction by 20,000, and
        its mean keeps 316 times the error. So without clipping, the draws of a model that was
        trained briefly can grow without bound.)

    See `ConditionedMLP` for the others.
    """

    clip: float = 0.0

    is_published: ClassVar[bool] = True
    outputs: ClassVar[int] = 2

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Head.check_config`."""
        if not 2 <= config.head_steps <= DIFFUSION_STEPS:
            raise UserError(
                f"model.head_steps={config.head_steps} must be from 2 to {DIFFUSION_STEPS}"
            )
        if not 0 <= config.head_clip < math.inf:
            raise UserError(f"model.head_clip={config.head_clip} must be 0 or more and finite")

    @classmethod
    def from_config(cls, config: Any, **more: Any) -> ConditionedMLP:
        """See `LatentHead.from_config`."""
        return super().from_config(config, clip=config.head_clip, **more)

    def loss(
        self, feature: Float[Array, "N Z"], targets: Float[Array, "N C"], keys: Key[Array, " N"]
    ) -> Float[Array, "N C"]:
        """The mean over `draws` of the squared error of the noise and the bound for the variance.

        The bound is in bits and gives no gradient to the prediction of the noise.
        """

        def draw(key: Key[Array, ""]) -> tuple[Array, Array]:
            time_key, noise_key = jax.random.split(key)
            time = jax.random.randint(time_key, (self.draws,), 0, DIFFUSION_STEPS)
            return time, jax.random.normal(noise_key, (self.draws, self.channels))

        time, noise = jax.vmap(draw, out_axes=1)(keys)
        error, bound = self.losses(feature, targets, time, noise)
        return jnp.mean(error + bound, axis=0)

    def losses(
        self,
        feature: Float[Array, "N Z"],
        targets: Float[Array, "N C"],
        time: Int[Array, "draws N"],
        noise: Float[Array, "draws N C"],
    ) -> tuple[Float[Array, "draws N C"], Float[Array, "draws N C"]]:
        """The squared error of the noise, and the bound for the variance in bits."""
        of_time = _lookups(_training(), time[..., None])
        targets = jnp.broadcast_to(targets, noise.shape)
        noisy = of_time.add_noise(targets, noise)
        found = self.denoise(noisy, self.condition(feature, time))
        error = jnp.square(noise - found.noise)

        mean, logvar = of_time.reverse(noisy, jax.lax.stop_gradient(found.noise), found.place)
        true_mean = of_time.posterior_mean(targets, noisy)
        divergence = _divergence(true_mean, of_time.low, mean, logvar)
        first = -_binned_log_likelihood(targets, mean, jnp.exp(0.5 * logvar))
        bound = jnp.where(time[..., None] == 0, first, divergence) / math.log(2)
        return error, bound

    def denoise(self, noisy: Float[Array, "*N C"], condition: Float[Array, "*N D"]) -> Prediction:
        """See `ConditionedMLP.network`."""
        return Prediction(*jnp.split(self.network(noisy, condition), 2, axis=-1))

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Float[Array, "N C"], None]:
        """Draws latents; see `Head.sample`. There is no probability.

        The temperature scales the noise that the reverse steps add. Guidance mixes the predictions
        of the noise; the variance is that of the class.
        """
        schedule = _training().respaced(self.steps)
        start = draw_noise(keys, self.steps, self.channels)
        condition = self.branches(feature, guidance)
        times = self.time_embedding(jnp.asarray(schedule.timesteps))

        def reverse(
            head: "DiffusionHead", x: Float[Array, "N C"], i: Int[Array, ""]
        ) -> tuple[Float[Array, "N C"], None]:
            noise = temperature * draw_noise(keys, i, self.channels)
            at_time = condition + times[i][None, None]
            return head.reverse_step(x, i, noise, at_time, schedule, guidance), None

        scan = nn.scan(
            reverse, variable_broadcast="params", split_rngs={"params": False}, reverse=True
        )
        return scan(self, start, jnp.arange(self.steps))[0], None

    def reverse_step(
        self,
        x: Float[Array, "N C"],
        i: Int[Array, ""],
        noise: Float[Array, "N C"],
        condition: Float[Array, "N branches D"],
        schedule: NoiseSchedule,
        guidance: Guidance | None,
    ) -> Float[Array, "N C"]:
        """x after the reverse step i of a schedule; the last one, i = 0, adds no noise."""
        noisy = jnp.broadcast_to(x[:, None], (*condition.shape[:2], self.channels))
        found = self.denoise(noisy, condition)
        predicted = mixed(found.noise, guidance)
        of_step = _lookups(schedule, i)
        mean, logvar = of_step.reverse(x, predicted, found.place[:, 0], self.clip)
        return mean + jnp.where(i > 0, jnp.exp(0.5 * logvar) * noise, 0)


class _AtTime(NamedTuple):
    """A schedule at some steps, float32; arrays that broadcast against latents `[..., C]`."""

    of_signal: Array  # Factors of the data, and of the noise, in the noisy latents.
    of_noise: Array
    inverse_signal: Array  # Factors of the noisy latents, and of the noise, in the data.
    inverse_noise: Array
    low: Array  # The bounds of the log-variance of a reverse step.
    high: Array
    of_data: Array
    of_noisy: Array

    def add_noise(self, x: Array, noise: Array) -> Array:
        return self.of_signal * x + self.of_noise * noise

    def posterior_mean(self, x: Array, noisy: Array) -> Array:
        """The mean of a reverse step, given the data."""
        return self.of_data * x + self.of_noisy * noisy

    def reverse(
        self, noisy: Array, noise: Array, place: Array, clip: float = 0.0
    ) -> tuple[Array, Array]:
        """Mean and log-variance of a reverse step, given the prediction."""
        data = self.inverse_signal * noisy - self.inverse_noise * noise
        if clip:
            data = jnp.clip(data, -clip, clip)
        share = (place + 1) / 2
        return self.posterior_mean(data, noisy), share * self.high + (1 - share) * self.low


@functools.cache
def _training() -> NoiseSchedule:
    return NoiseSchedule.cosine(DIFFUSION_STEPS)


def _lookups(schedule: NoiseSchedule, time: Int[Array, "..."]) -> _AtTime:
    tables = (
        np.sqrt(schedule.signal),
        np.sqrt(1 - schedule.signal),
        np.sqrt(1 / schedule.signal),
        np.sqrt(1 / schedule.signal - 1),
        schedule.posterior_logvar,
        np.log(schedule.betas),
        schedule.posterior_of_data,
        schedule.posterior_of_noisy,
    )
    return _AtTime(*(jnp.asarray(table, jnp.float32)[time] for table in tables))


def _divergence(mean: Array, logvar: Array, other_mean: Array, other_logvar: Array) -> Array:
    """KL of normal distributions from others, in nats."""
    scaled = jnp.exp(logvar - other_logvar)
    distance = jnp.square(mean - other_mean) * jnp.exp(-other_logvar)
    return 0.5 * (other_logvar - logvar + scaled + distance - 1)


def _binned_log_likelihood(x: Array, mean: Array, deviation: Array) -> Array:
    """Of 8-bit data in [-1, 1], whose outermost bins are unbounded (Ho et al., 2020, eq. 13)."""
    below = _normal_cdf((x - mean - _HALF_BIN) / deviation)
    above = _normal_cdf((x - mean + _HALF_BIN) / deviation)
    chance = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(chance, 1e-12))


def _normal_cdf(x: Array) -> Array:
    """By a tanh (Page, 1977), which the release of Nichol & Dhariwal uses."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
