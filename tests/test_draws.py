"""Draws: cached channels against the training logits, and noise that is independent.

`test_heads.py` compares draws of one position with their probabilities.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tiny_model import TINY, random_params, tiny

from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate
from tokenbridge_jax.transformer import unstack


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_channels_equal_the_training_logits(params, quirk: bool, dtype: str):
    """Greedy indices are the best of the logits that teacher forcing gives for them.

    With the quirk, the training logits of a model whose first channel embedding has the first
    timestep embedding added: that is where the first token gets it.
    """
    config = tiny(first_token_quirk=quirk, dtype=dtype)
    count = 200
    feature = jnp.asarray(np.random.default_rng(5).normal(size=(count, TINY.decoder_width)), dtype)
    keys = jax.random.split(jax.random.key(0), count)
    head = params["head"]

    def apply(head, method, *arguments):
        scan_layers = method != "sample"
        tree = params | {"head": head}
        run = lambda model: getattr(model.head, method)(*arguments)  # noqa: E731
        variables = {"params": tree if scan_layers else unstack(tree)}
        model = TokenBridge(dataclasses.replace(config, scan_layers=scan_layers))
        return model.apply(variables, method=run)

    sample = jax.jit(lambda head: apply(head, "sample", feature, keys, jnp.float32(0)))
    drawn, log_probs = sample(head)
    shifted = head | {
        "channel_embed": head["channel_embed"].at[0].add(head["timestep_embed"][0] * quirk)
    }
    logits = np.asarray(jax.jit(lambda head: apply(head, "logits", feature, drawn))(shifted))
    in_channel_order = np.asarray(drawn)[:, TINY.channel_order]
    chosen = np.take_along_axis(logits, in_channel_order[..., None], axis=-1)[..., 0]
    regret = logits.max(axis=-1) - chosen
    if dtype == "float32":
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), in_channel_order)
        expected = chosen - special.logsumexp(logits.astype(np.float64), axis=-1)
        np.testing.assert_allclose(log_probs, expected.sum(axis=-1), atol=1e-4)
    else:
        # Logits of size ~10 in bfloat16 carry errors of ~0.1: the choice is at most that bad.
        assert regret.max() < 0.02 * np.abs(logits).max()
    # Far from trivial: every level occurs, and the quirk changes some of them.
    assert len(np.unique(drawn)) == TINY.levels
    if quirk:
        plain = np.asarray(jax.jit(lambda head: apply(head, "logits", feature, drawn))(head))
        assert (np.argmax(plain, axis=-1) != in_channel_order).any()
    if quirk and dtype == "float32":
        sampled = jax.jit(lambda head: apply(head, "logits", feature, drawn, True))(head)
        np.testing.assert_allclose(sampled, logits, atol=1e-5 * np.abs(logits).max())


def test_noise_of_positions_channels_and_samples_is_independent(params):
    """At a huge temperature nothing but noise is left: every pair of draws must be independent."""
    count = 500
    settings = SamplingSettings(3, temperature=1e6)
    request = Request(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), seed=5)
    drawn = np.asarray(generate(TINY, params, request, settings))
    levels, flat = TINY.levels, drawn.reshape(count, -1)
    assert stats.chisquare(np.bincount(flat.ravel(), minlength=levels)).pvalue > 1e-3
    values = []
    for i in range(flat.shape[1]):
        for other in (flat[:, :i].T, [np.roll(flat[:, i], 1)]):  # Its neighbours, the next sample.
            values += [stats.chisquare(_pairs(flat[:, i], x, levels)).pvalue for x in other]
    # Uniform p-values: the smallest of n is above 0.001 / n with probability 0.999.
    assert min(values) > 1e-3 / len(values)
    assert 0.4 < np.mean(values) < 0.6


def _pairs(a: np.ndarray, b: np.ndarray, levels: int) -> np.ndarray:
    return np.bincount(a * levels + b, minlength=levels**2)
