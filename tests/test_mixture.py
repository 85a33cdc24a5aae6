"""GIVT's mixture head: exact densities, draws, guidance, and likelihoods of whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from goldens_model import assert_close
from scipy import special, stats
from tiny_model import (
    head_method,
    jitted,
    random_batch,
    random_params,
    relative_error,
    tiny,
    tiny_pipeline,
)

from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.heads.mixture import MIN_DEVIATION, MixtureHead
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import bits, make_validation

TINY = tiny(head="mixture", quantizer=Unquantized(), channel_order=(0, 1, 2, 3), head_components=3)
COUNT, DRAWS = 6, 4000


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, seed=2, spread=0.15)


def mixture_of(params, feature):
    """The mixtures of positions in float64: weights, means and deviations."""
    layer = params["head"]["mixture_proj"]
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    numbers = np.tensordot(np.asarray(feature, np.float64), kernel, 1) + bias
    logits, means, raw = np.split(numbers, [1, 5], axis=-1)
    return special.softmax(logits[..., 0], -1), means, np.logaddexp(0, raw) + MIN_DEVIATION


def log_density(mixture, x):
    """Of the first c channels, for every c: `[N, C]`."""
    weights, means, deviations = mixture
    of_channels = stats.norm.logpdf(x[:, None], means, deviations)
    joint = np.log(weights)[..., None] + np.cumsum(of_channels, axis=2)
    return special.logsumexp(joint, axis=1)


def random_inputs(count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    feature = rng.normal(size=(count, TINY.decoder_width)).astype(np.float32)
    return feature, rng.normal(size=(count, TINY.channels)).astype(np.float32)


# --- Densities ------------------------------------------------------------------------------------


def test_densities_of_channels_are_those_given_the_channels_before(params):
    feature, latents = random_inputs()
    nll = head_method(TINY, "nll")(params, feature, latents)
    expected = log_density(mixture_of(params, feature), latents)
    np.testing.assert_allclose(-np.cumsum(nll, axis=1), expected, atol=1e-4)
    keys = jax.random.split(jax.random.key(0), COUNT)
    np.testing.assert_array_equal(head_method(TINY, "loss")(params, feature, latents, keys), nll)


def test_the_loss_and_its_gradients_are_pytorchs(params):
    feature, latents = random_inputs()

    def loss(params, feature):
        return head_method(TINY, "nll")(params, feature, latents).sum()

    found, gradients = jax.value_and_grad(loss, argnums=(0, 1))(params, jnp.asarray(feature))

    leaf = lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True)  # noqa: E731
    layer, inputs = jax.tree.map(leaf, params["head"]["mixture_proj"]), leaf(feature)
    numbers = torch.tensordot(inputs, layer["kernel"], 1) + layer["bias"]
    logits, means, raw = torch.split(numbers, [1, 4, 4], -1)
    deviations = torch.nn.functional.softplus(raw) + MIN_DEVIATION
    of = torch.distributions
    mixture = of.MixtureSameFamily(
        of.Categorical(logits=logits[..., 0]), of.Independent(of.Normal(means, deviations), 1)
    )
    expected = -mixture.log_prob(torch.tensor(latents).double()).sum()
    expected.backward()
    assert relative_error(found, expected.detach()) < 1e-5
    for name in ("kernel", "bias"):
        ours = gradients[0]["head"]["mixture_proj"][name]
        assert_close(ours, layer[name].grad, 1e-4, name)
    assert relative_error(gradients[1], inputs.grad) < 1e-4


def test_the_density_is_bounded():
    """A deviation is never below the floor, however sure the head is."""
    head = MixtureHead(2, components=2)
    kernel, bias = jnp.zeros((3, 2, 5)), jnp.zeros((2, 5)).at[:, 3:].set(-1e4)
    params = {"params": {"mixture_proj": {"kernel": kernel, "bias": bias}}}
    nll = head.apply(params, jnp.zeros((1, 3)), jnp.zeros((1, 2)), method="nll")
    expected = -stats.norm.logpdf(0, 0, MIN_DEVIATION)
    np.testing.assert_allclose(nll[0], [expected] * 2, rtol=1e-5)


# --- Draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_mixtures_distribution(params, temperature):
    """Any projection of a mixture of normals is one; its distribution function is known."""
    feature, _ = random_inputs(1)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn, log_probs = head_method(TINY, "sample")(
        params, np.repeat(feature, DRAWS, 0), keys, jnp.float32(temperature)
    )
    mixture = mixture_of(params, feature)
    weights, means, deviations = (x[0] for x in mixture)
    weights = special.softmax(np.log(weights) / temperature)
    assert weights.min() > 0.02
    for seed in range(4):
        direction = np.random.default_rng(seed).normal(size=4)
        centres = means @ direction
        spreads = temperature * np.sqrt(deviations**2 @ direction**2)

        def cdf(x, centres=centres, spreads=spreads):
            return stats.norm.cdf((x[:, None] - centres) / spreads) @ weights

        projected = np.asarray(drawn) @ direction
        assert stats.kstest(projected, cdf).pvalue > 1e-3
        # The test is able to detect another spread.
        assert stats.kstest(projected, lambda x, cdf=cdf: cdf(x / 1.2)).pvalue < 1e-3
    expected = log_density(tuple(np.repeat(x, DRAWS, 0) for x in mixture), drawn)[:, -1]
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_temperature_0_takes_the_mean_of_the_likeliest_component(params):
    feature, _ = random_inputs()
    keys = jax.random.split(jax.random.key(0), COUNT)
    weights, means, _ = mixture_of(params, feature)
    expected = np.take_along_axis(means, weights.argmax(1)[:, None, None], 1)[:, 0]
    for guidance in (None, Guidance(jnp.asarray(random_inputs(seed=1)[0]), jnp.float32(2))):
        drawn, log_probs = head_method(TINY, "sample")(
            params, feature, keys, jnp.float32(0), guidance
        )
        np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5)
        assert np.isfinite(log_probs).all()


@pytest.mark.parametrize(("scale", "temperature"), [(0.0, 1.0), (1.0, 1.0), (3.0, 1.0), (2.0, 0.6)])
def test_guidance_draws_from_the_published_density(scale, temperature):
    """In one dimension p (p / null)**(scale - 1) can be normalised on a grid."""
    head = MixtureHead(1, components=2)
    # The feature chooses a row of logits, means and raw deviations: the class's or null's.
    numbers = np.array(
        [[[-0.4, -0.6, 0.1], [0.6, 0.9, -0.3]], [[0.4, -0.9, 0.6], [-0.4, 0.5, 0.6]]]
    )
    params = {"mixture_proj": {"kernel": jnp.asarray(numbers), "bias": jnp.zeros((2, 3))}}
    grid = np.linspace(-8, 8, 20001)

    def density(numbers, temperature):
        spreads = temperature * (np.logaddexp(0, numbers[:, 2]) + MIN_DEVIATION)
        each = stats.norm.pdf(grid[:, None], numbers[:, 1], spreads)
        return each @ special.softmax(numbers[:, 0] / temperature)

    def cdf_of(density):
        mass = np.cumsum(density)
        return lambda x: np.interp(x, grid, mass / mass[-1])

    p, null = density(numbers[0], 1), density(numbers[1], 1)
    tempered = density(numbers[0], temperature)
    features = jnp.repeat(jnp.eye(2), DRAWS, axis=0)
    drawn, log_probs = jax.jit(head.apply, static_argnames="method")(
        {"params": params},
        features[:DRAWS],
        jax.random.split(jax.random.key(1), DRAWS),
        jnp.float32(temperature),
        Guidance(features[DRAWS:], jnp.float32(scale)),
        method="sample",
    )
    drawn = np.asarray(drawn)[:, 0]
    assert stats.kstest(drawn, cdf_of(tempered * (p / null) ** (scale - 1))).pvalue > 1e-3
    np.testing.assert_allclose(log_probs, np.log(np.interp(drawn, grid, p)), atol=1e-3)
    if scale != 1:  # The test is able to detect that guidance does nothing.
        assert stats.kstest(drawn, cdf_of(tempered)).pvalue < 1e-3


# --- In the model ---------------------------------------------------------------------------------


def test_likelihoods_of_a_model(params):
    """`log_probs` of whole images, and what validation reports: bits a latent."""
    batch = random_batch(TINY, 4, seed=3)
    latents, labels = batch["indices"], batch["labels"]
    one = tiny_pipeline(TINY, params)
    found = one.log_probs(latents, labels.tolist())
    order = jnp.tile(jnp.arange(TINY.positions), (4, 1))
    hidden = jnp.int32(TINY.positions)
    features = jitted(TINY, "features")(params, latents, labels, order, hidden, jnp.zeros(4, bool))
    feature = np.asarray(features).reshape(-1, TINY.decoder_width)
    totals = log_density(mixture_of(params, feature), latents.reshape(-1, 4))[:, -1]
    np.testing.assert_allclose(found.sum(axis=-1).ravel(), totals, rtol=1e-4)
    # All positions are hidden at every ratio.
    masks = MaskSampler(TINY.positions, minimum=0.99)
    validate = make_validation(TINY, masks, one.mesh)
    with meshes.use_mesh(one.mesh):
        nats = validate(params, [batch | {"weights": np.ones(4, np.float32)}])
    expected = -totals.sum() / latents.size / np.log(2)
    assert bits(nats) == pytest.approx(expected, rel=1e-4)
