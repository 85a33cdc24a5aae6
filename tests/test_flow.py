"""The flow head: its loss against PyTorch, its solvers against scipy's, and normal data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_mlp
from goldens_model import assert_close
from scipy import integrate, stats
from tiny_model import head_method, jitted, random_params, relative_error, tiny

from tokenbridge_jax.heads.conditioned_mlp import draw_noise
from tokenbridge_jax.heads.flow import FlowHead
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime.errors import UserError

TINY = tiny(
    head="flow",
    quantizer=Unquantized(),
    channel_order=(0, 1, 2, 3),
    head_layers=2,
    head_steps=6,
    head_draws=3,
)
COUNT = 6


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, seed=2, spread=0.1)


def random_inputs(draws, seed=0):
    """Feature, latents, time and noise."""
    rng = np.random.default_rng(seed)
    return tuple(
        np.asarray(x, np.float32)
        for x in (
            rng.normal(size=(COUNT, TINY.decoder_width)),
            rng.normal(size=(COUNT, TINY.channels)),
            rng.random((draws, COUNT)),
            rng.normal(size=(draws, COUNT, TINY.channels)),
        )
    )


def test_the_loss_and_its_gradients_are_pytorchs(params):
    feature, latents, time, noise = inputs = random_inputs(draws=4)

    def loss(head, feature):
        losses = TokenBridge(TINY).apply(
            {"params": {"head": head}},
            method=lambda model: model.head.losses(feature, *map(jnp.asarray, inputs[1:])),
        )
        return jnp.mean(losses), losses

    with_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, found), gradients = with_gradient(params["head"], jnp.asarray(feature))

    state, inputs = torch_mlp.leaves(params["head"]), torch_mlp.leaves(feature)
    x, t, start = (torch.tensor(a).double() for a in (latents, time[..., None], noise))
    noisy = torch.lerp(start, x.expand(start.shape), t)
    velocity = torch_mlp.network(state, inputs, noisy, 1000 * t[..., 0])
    expected = (velocity - (x - start)) ** 2
    expected.mean().backward()
    assert_close(found, expected.detach(), 1e-4, "loss")
    assert relative_error(gradients[1], inputs.grad) < 1e-4
    jax.tree.map(
        lambda ours, theirs: assert_close(ours, theirs.grad, 1e-4, "gradient"), gradients[0], state
    )


def test_what_the_loss_draws(params, monkeypatch):
    """Times are uniform, noises normal, and each position has its own."""
    seen = {}

    def record(self, feature, targets, time, noise):
        seen.update(time=np.asarray(time), noise=np.asarray(noise))
        return noise

    monkeypatch.setattr(FlowHead, "losses", record)
    keys = jax.random.split(jax.random.key(0), 3000)
    feature, latents = jnp.zeros((3000, TINY.decoder_width)), jnp.zeros((3000, TINY.channels))
    loss = TokenBridge(TINY).apply(
        {"params": params}, method=lambda model: model.head.loss(feature, latents, keys)
    )
    time, noise = seen["time"], seen["noise"]
    assert (time.shape, noise.shape) == ((3, 3000), (3, 3000, 4))
    np.testing.assert_allclose(loss, noise.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert stats.kstest(time.ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_solvers_converge_to_scipys_solution(params):
    """With guidance and a temperature: the error falls with the steps, or their square."""
    scale, temperature = 2.5, 0.8
    # Without the fast sinusoids, whose random weights would need steps of a thousandth.
    smooth = jnp.arange(256) % 128 > 90
    kernel = params["head"]["time_fc1"]["kernel"] * 10 * smooth[:, None]
    layers = params["head"] | {"time_fc1": params["head"]["time_fc1"] | {"kernel": kernel}}
    layers["output"] = jax.tree.map(lambda x: 5 * x, layers["output"])
    params = params | {"head": layers}
    features = [jnp.asarray(random_inputs(1, seed)[0]) for seed in (0, 1)]
    keys = jax.random.split(jax.random.key(4), COUNT)
    start = temperature * np.asarray(draw_noise(keys, 0, TINY.channels))

    def network(model, feature, x, t):
        head = model.head
        condition = head.condition_proj(feature) + head.time_embedding(1000 * t)[None]
        return head.network(x, condition)

    def velocity(t, x):
        x = jnp.asarray(x.reshape(start.shape), jnp.float32)
        of_class, null = (jitted(TINY, network)(params, f, x, jnp.float32(t)) for f in features)
        return np.ravel(null + scale * (of_class - null))

    exact = integrate.solve_ivp(velocity, (0, 1), start.ravel(), rtol=1e-6, atol=1e-6)
    exact = exact.y[:, -1].reshape(start.shape)
    assert relative_error(start, exact) > 0.3

    def error(solver, steps):
        config = dataclasses.replace(TINY, head_solver=solver, head_steps=steps)
        guidance = Guidance(features[1], jnp.float32(scale))
        drawn, log_probs = head_method(config, "sample")(
            params, features[0], keys, jnp.float32(temperature), guidance
        )
        assert log_probs is None
        return np.linalg.norm(drawn - exact) / np.linalg.norm(exact)

    for solver, order in (("euler", 1), ("heun", 2)):
        first, second = error(solver, 24), error(solver, 96)
        assert np.log2(first / second) / 2 == pytest.approx(order, abs=0.15)
    assert second < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_perfect_prediction_draws_the_data(params, monkeypatch, temperature):
    """For normal data the velocity is known; its flow maps noise to mean + deviation noise."""
    mean, deviation = 0.5, 0.3

    def network(self, noisy, condition):
        t = condition[0, 0, 0] / 1000
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        return mean + (t * deviation**2 - (1 - t)) / variance * (noisy - t * mean)

    monkeypatch.setattr(FlowHead, "network", network)
    monkeypatch.setattr(
        FlowHead, "time_embedding", lambda self, time: jnp.repeat(time[:, None], self.width, 1)
    )
    config = dataclasses.replace(TINY, head_steps=100)
    keys = jax.random.split(jax.random.key(0), 500)
    drawn, _ = head_method(config, "sample")(
        jax.tree.map(jnp.zeros_like, params),
        jnp.zeros((500, config.decoder_width)),
        keys,
        jnp.float32(temperature),
    )
    expected = mean + deviation * temperature * draw_noise(keys, 0, config.channels)
    np.testing.assert_allclose(drawn, expected, atol=1e-3)


def test_an_unknown_solver_is_refused():
    with pytest.raises(UserError, match=r"model\.head_solver='rk4' is not one of euler, heun"):
        dataclasses.replace(TINY, head_solver="rk4")
