"""The masked head: what a step sees and reveals, its loss and likelihood, by brute force."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from tiny_model import head_method, normal, program_flops, random_params, tiny, tree_error
from torch.nn import functional

from tokenbridge_jax.flops import head_flops
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.heads.masked import MaskedHead
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling import sampler
from tokenbridge_jax.sampling.schedule import SamplingSettings
from tokenbridge_jax.transformer import ChannelAttention, unstack

# No place of the channel order is its own inverse, and C is no multiple of K.
C, V = 3, 3
ORDER = (1, 2, 0)
FIXED = tiny(
    head="masked", quantizer=Quantizer.gaussian(V), channel_order=ORDER, reveal_steps=2,
)  # fmt: skip
CONFIDENCE = dataclasses.replace(FIXED, reveal_order="confidence")
PARAMS = random_params(FIXED, seed=1, spread=0.25)
# All outcomes of a position, in channel order, and in autoencoder order as heads take them.
OUTCOMES = np.array(list(itertools.product(range(V), repeat=C)), np.int32)
INDICES = OUTCOMES[:, np.argsort(ORDER)]
FEATURE = normal(5, 1, FIXED.decoder_width)
FEATURES = jnp.repeat(FEATURE, len(INDICES), axis=0)


@jax.jit
def predict(params, feature, indices, known):
    """The head's log-probabilities of all places, given the known ones; in channel order."""

    def run(model):
        return model.head._predict(model.head._condition(feature), indices, known)

    return jax.nn.log_softmax(TokenBridge(FIXED).apply({"params": params}, method=run))


@functools.cache
def conditionals() -> dict[tuple[bool, ...], np.ndarray]:
    """Log-probabilities [outcome, place] of every place's index, given any known places."""
    found = {}
    for known in itertools.product([False, True], repeat=C):
        log_p = predict(PARAMS, FEATURES, OUTCOMES, np.array([known]))
        found[known] = np.take_along_axis(np.asarray(log_p), OUTCOMES[..., None], -1)[..., 0]
    return found


def log_probs(groups: list[list[int]]) -> np.ndarray:
    """Of every outcome, if these groups of places are drawn one after another."""
    known, total = np.zeros(C, bool), np.zeros(len(OUTCOMES))
    for group in groups:
        total += conditionals()[tuple(known.tolist())][:, group].sum(axis=1)
        known[group] = True
    return total


def test_the_card_has_the_steps_and_their_order():
    size = "1 layers of width 16, 4 heads"
    assert MaskedHead.summary(FIXED) == f"{size}, 2 steps in fixed order"
    assert MaskedHead.summary(CONFIDENCE).endswith("steps in confidence order")


def test_the_likelihood_is_the_product_over_groups():
    nll = np.asarray(head_method(FIXED, "nll")(PARAMS, FEATURES, INDICES), np.float64)
    np.testing.assert_allclose(-nll.sum(axis=1), log_probs([[0], [1, 2]]), atol=1e-5)
    assert np.exp(-nll.sum(axis=1)).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("steps", "groups"), [(1, [[0, 1, 2]]), (3, [[0], [1], [2]])])
def test_one_step_is_parallel_and_c_steps_are_autoregressive(steps: int, groups: list):
    config = dataclasses.replace(FIXED, reveal_steps=steps)
    nll = np.asarray(head_method(config, "nll")(PARAMS, FEATURES, INDICES), np.float64)
    np.testing.assert_allclose(-nll.sum(axis=1), log_probs(groups), atol=1e-5)
    joint = np.exp(-nll.sum(axis=1)).reshape((V,) * C)
    marginals = [joint.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(C)]
    product = np.einsum("a,b,c->abc", *marginals)
    assert (np.abs(joint - product).max() < 1e-6) == (steps == 1)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_hidden_channel_does_not_change_the_others(steps: int):
    known = tuple(place < steps - 1 for place in range(C))
    log_p = conditionals()[known].reshape(V, V, V, C)
    hidden = tuple(range(steps - 1, C))
    # The place's own index only chooses which probability is read.
    for place in hidden:
        others = tuple(axis for axis in hidden if axis != place)
        if others:
            assert np.ptp(log_p[..., place], axis=others).max() < 1e-6
    assert np.ptp(log_p[..., C - 1], axis=0).min() > 1e-3


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FIXED, CONFIDENCE], ids=lambda config: config.reveal_order)
def test_the_expectation_of_the_loss_over_all_its_draws(config):
    """Fixed order: the exact likelihood. Confidence: the mean over all orders, one by one."""
    keys = jax.random.split(jax.random.key(2), 2400)
    known = head_method(config, "_draw_known")
    drawn = np.asarray(jax.vmap(lambda key: known(PARAMS, key)[0])(keys))
    numbers = drawn @ (1 << np.arange(C))
    if config is FIXED:
        chances = {0b000: 1 / 2, 0b001: 1 / 2}
        expected = -log_probs([[0], [1, 2]])
    else:
        chances = {number: 1 / C / math.comb(C, number.bit_count()) for number in range(2**C - 1)}
        orders = [[[place] for place in order] for order in itertools.permutations(range(C))]
        expected = -np.mean([log_probs(order) for order in orders], axis=0)
    counts = np.array([np.sum(numbers == number) for number in chances])
    assert counts.sum() == len(keys)
    assert stats.chisquare(counts, np.array(list(chances.values())) * len(keys)).pvalue > 1e-3
    mean = np.zeros((len(INDICES), C))
    for number, chance in chances.items():
        key = jnp.repeat(keys[np.argmax(numbers == number)][None], len(INDICES))
        mean += chance * np.asarray(head_method(config, "loss")(PARAMS, FEATURES, INDICES, key))
    np.testing.assert_allclose(mean.sum(axis=1), expected, atol=2e-5)
    if config is FIXED:
        nll = head_method(FIXED, "nll")(PARAMS, FEATURES, INDICES)
        np.testing.assert_allclose(mean, nll, atol=2e-5)


# --- Sampling -------------------------------------------------------------------------------------


@functools.cache
def draw(order: str, temperature: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws in channel order, and their log-probabilities."""
    config = dataclasses.replace(FIXED, reveal_order=order)
    count = 3000 if temperature else 4
    features, keys = jnp.repeat(FEATURE, count, 0), jax.random.split(jax.random.key(3), count)
    sample = head_method(config, "sample")
    drawn, log_prob = sample(PARAMS, features, keys, jnp.float32(temperature))
    return np.asarray(drawn)[:, ORDER], None if log_prob is None else np.asarray(log_prob)


def test_draws_in_fixed_order_have_the_exact_probabilities():
    drawn, log_prob = draw("fixed", 1.0)
    numbers, expected = np.ravel_multi_index(tuple(drawn.T), (V,) * C), log_probs([[0], [1, 2]])
    np.testing.assert_allclose(log_prob, expected[numbers], atol=1e-5)
    counts = np.bincount(numbers, minlength=V**C)
    p = np.exp(expected)
    assert stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3


def by_confidence(log_p_of, steps: int) -> np.ndarray:
    """The rule at temperature 0, place by place: `log_p_of(indices, known)` is `[C, V]`."""
    indices, known = np.zeros(C, int), np.zeros(C, bool)
    for step in range(1, steps + 1):
        log_p = log_p_of(indices, known)
        best = {place: log_p[place].max() for place in range(C) if not known[place]}
        for place in best:
            indices[place] = log_p[place].argmax()
        while known.sum() < step * C // steps:
            place = max(best, key=best.__getitem__)
            known[place] = True
            del best[place]
    return indices


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [2, 3])
def test_confidence_reveals_the_most_certain_channels(steps: int, seed: int):
    config = dataclasses.replace(CONFIDENCE, reveal_steps=steps)
    params = random_params(FIXED, seed, spread=0.4)
    feature = normal(seed, 1, FIXED.decoder_width)

    def log_p_of(indices, known):
        return np.asarray(predict(params, feature, indices[None], known[None]))[0]

    key = jax.random.key(0)[None]
    drawn, log_prob = head_method(config, "sample")(params, feature, key, jnp.float32(0))
    assert log_prob is None
    np.testing.assert_array_equal(
        np.asarray(drawn)[0, np.array(ORDER)], by_confidence(log_p_of, steps)
    )


def test_draws_by_confidence_have_the_probabilities_of_the_rule():
    """Of two steps: all outcomes of the first, of which one channel stays, then the others."""
    first = conditionals()[(False,) * C]
    expected = np.zeros(len(OUTCOMES))
    for number, outcome in enumerate(OUTCOMES):
        place = int(np.argmax(first[number]))
        known = tuple(other == place for other in range(C))
        # What this channel's index becomes does not depend on the other places' first draws,
        # apart from the choice of the place. The second draw is of any outcome that agrees.
        same = OUTCOMES[:, place] == outcome[place]
        second = conditionals()[known].copy()
        second[:, place] = 0
        expected += np.exp(first[number].sum()) * same * np.exp(second.sum(axis=1))
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    drawn, _ = draw("confidence", 1.0)
    counts = np.bincount(np.ravel_multi_index(tuple(drawn.T), (V,) * C), minlength=V**C)
    assert stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-3


def test_guidance_mixes_features():
    null, keys = normal(6, *FEATURE.shape), jax.random.key(0)[None]
    sample = head_method(CONFIDENCE, "sample")
    scale, temperature = jnp.float32(3), jnp.float32(1)
    guided, _ = sample(PARAMS, FEATURE, keys, temperature, Guidance(null, scale))
    mixed, _ = sample(PARAMS, null + 3 * (FEATURE - null), keys, temperature)
    np.testing.assert_array_equal(guided, mixed)


def test_no_likelihood_without_a_fixed_order():
    assert FIXED.has_probabilities
    assert not CONFIDENCE.has_probabilities
    with pytest.raises(UserError, match=r"no exact likelihood with model\.reveal_order='confidenc"):
        head_method(CONFIDENCE, "nll")(PARAMS, FEATURES, INDICES)
    request = sampler.Request(np.zeros(1, np.int32), np.zeros(1, np.int32))
    settings = SamplingSettings(2, order="confidence")
    with pytest.raises(UserError, match=r"order='confidence' needs probabilities, which model\.he"):
        sampler.generate(CONFIDENCE, PARAMS, request, settings)


# --- The network ----------------------------------------------------------------------------------


def test_attention_is_pytorchs_over_all_channels():
    attention = ChannelAttention(heads=2, causal=False)
    x = normal(0, 3, 5, 8)
    leaves, structure = jax.tree.flatten(nn.unbox(attention.init(jax.random.key(0), x)["params"]))
    leaves = [normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, leaves)
    weights = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params)
    qkv = torch.einsum("ntd,dphk->pnhtk", torch.tensor(np.asarray(x)), weights["qkv"]["kernel"])
    q, k, v = qkv + weights["qkv"]["bias"][:, None, :, None]
    q, k = (
        functional.layer_norm(part, (4,), weights[name]["scale"], weights[name]["bias"], 1e-6)
        for part, name in ((q, "q_norm"), (k, "k_norm"))
    )
    attended = functional.scaled_dot_product_attention(q, k, v)
    expected = torch.einsum("nhtk,hkd->ntd", attended, weights["proj"]["kernel"])
    expected = (expected + weights["proj"]["bias"]).numpy()
    found, _ = attention.apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_scanned_layers_are_unrolled_layers():
    config = dataclasses.replace(FIXED, head_layers=2)
    params, keys = random_params(config, spread=0.2), jax.random.split(jax.random.key(0), 27)

    def gradient(config, params):
        @jax.jit
        def mean(params):
            params = params if config.scan_layers else unstack(params)
            arguments = FEATURES, jnp.asarray(INDICES), keys
            run = TokenBridge(config).apply
            return jnp.mean(
                run({"params": params}, method=lambda model: model.head.loss(*arguments))
            )

        return jax.grad(mean)(params)["head"]

    unrolled = dataclasses.replace(config, scan_layers=False)
    assert tree_error(gradient(unrolled, params), gradient(config, params)) < 5e-5


def test_flops_of_drawing_are_those_of_the_program():
    config = dataclasses.replace(FIXED, head_layers=2, scan_layers=False)

    def run(params, keys):
        return TokenBridge(config).apply(
            {"params": unstack(params)},
            method=lambda model: model.head.sample(FEATURE, keys, jnp.float32(1)),
        )

    traced = jax.jit(run).trace(abstract_params(config), jax.random.key(0)[None])
    assert program_flops(traced.jaxpr.jaxpr) == head_flops(config)
