"""Flow matching (Lipman et al., 2023, arXiv 2210.02747), by the network of MAR's diffusion head.

Time runs from noise, t = 0, to latents x, t = 1, on straight paths x_t = (1 - t) noise + t x. The
network predicts the velocity x - noise of a path from x_t, t and the backbone's feature. Its mean
over the paths through a point is the velocity of a flow that turns noise into latents.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from tokenbridge_jax.heads.conditioned_mlp import ConditionedMLP, draw_noise, mixed
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.runtime.errors import UserError

# How often each method runs the network in a step; its order of convergence is the same number.
SOLVERS = {"euler": 1, "heun": 2}
# The network's time of t = 1: its sinusoids are made for the steps of a diffusion.
_TIME_SCALE = 1000


class FlowHead(ConditionedMLP):
    """Draws latents by integrating the flow in evenly spaced steps.

    Attributes:
      solver: of `SOLVERS`.
    """

    solver: str = "heun"

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Head.check_config`."""
        if config.head_solver not in SOLVERS:
            raise UserError(
                f"model.head_solver='{config.head_solver}' is not one of {', '.join(SOLVERS)}"
            )

    @classmethod
    def from_config(cls, config: Any, **more: Any) -> ConditionedMLP:
        """See `LatentHead.from_config`."""
        return super().from_config(config, solver=config.head_solver, **more)

    @classmethod
    def summary(cls, config: Any) -> str:
        """See `Head.summary`."""
        return f"{super().summary(config)} of {config.head_solver}"

    @classmethod
    def runs(cls, config: Any) -> int:
        """See `ConditionedMLP.runs`."""
        return super().runs(config) * SOLVERS[config.head_solver]

    def loss(
        self, feature: Float[Array, "N Z"], targets: Float[Array, "N C"], keys: Key[Array, " N"]
    ) -> Float[Array, "N C"]:
        """The mean over `draws` of the squared error of the velocity.

        t is uniform, so every part of the path has equal weight. A logit-normal t would almost
        never train the ends, where sampling begins and `heun` runs the network last.
        """

        def draw(key: Key[Array, ""]) -> tuple[Array, Array]:
            time_key, noise_key = jax.random.split(key)
            time = jax.random.uniform(time_key, (self.draws,))
            return time, jax.random.normal(noise_key, (self.draws, self.channels))

        time, noise = jax.vmap(draw, out_axes=1)(keys)
        return jnp.mean(self.losses(feature, targets, time, noise), axis=0)

    def losses(
        self,
        feature: Float[Array, "N Z"],
        targets: Float[Array, "N C"],
        time: Float[Array, "draws N"],
        noise: Float[Array, "draws N C"],
    ) -> Float[Array, "draws N C"]:
        """The squared error of the velocity at these times on the paths from these noises."""
        t = time[..., None]
        noisy = (1 - t) * noise + t * targets[None]
        predicted = self.network(noisy, self.condition(feature, _TIME_SCALE * time))
        return jnp.square(targets[None] - noise - predicted)

    def sample(
        self,
        feature: Float[Array, "N Z"],
        keys: Key[Array, " N"],
        temperature: Float[Array, ""],
        guidance: Guidance | None = None,
    ) -> tuple[Float[Array, "N C"], None]:
        """Draws latents; see `Head.sample`. There is no probability.

        The temperature scales the noise at the start; nothing else is random. Guidance mixes the
        velocities of the branches at every time (as FlowAR does, arXiv 2412.15205).
        """
        condition = self.branches(feature, guidance)
        times = self.time_embedding(_TIME_SCALE * jnp.arange(self.steps + 1) / self.steps)

        def step(
            head: "FlowHead", x: Float[Array, "N C"], i: Int[Array, ""]
        ) -> tuple[Float[Array, "N C"], None]:
            def velocity(x: Float[Array, "N C"], i: Int[Array, ""]) -> Float[Array, "N C"]:
                noisy = jnp.broadcast_to(x[:, None], (*condition.shape[:2], head.channels))
                return mixed(head.network(noisy, condition + times[i][None, None]), guidance)

            slope = velocity(x, i)
            if head.solver == "heun":  # The mean of the velocities at both ends.
                slope = (slope + velocity(x + slope / head.steps, i + 1)) / 2
            return x + slope / head.steps, None

        start = temperature * draw_noise(keys, 0, self.channels)
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, start, jnp.arange(self.steps))[0], None
