"""Draws: cached channels against the training logits, and independent noise.

`test_heads.py` compares draws of one position with their probabilities.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tiny_model import TINY, head_method, tiny

from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_channels_equal_the_training_logits(params, quirk: bool, dtype: str):
    """Greedy indices have the largest logits that teacher forcing gives for these indices.

    With the quirk, those are the training logits of a model whose first channel embedding includes
    the first timestep embedding, because the first token gets its addition there.
    """
    config = tiny(first_token_quirk=quirk, dtype=dtype)
    count = 200
    feature = jnp.asarray(np.random.default_rng(5).normal(size=(count, TINY.decoder_width)), dtype)
    keys = jax.random.split(jax.random.key(0), count)
    drawn, log_probs = head_method(config, "sample")(params, feature, keys, jnp.float32(0))
    head, run = params["head"], head_method(config, "logits")
    embed = head["channel_embed"].at[0].add(head["timestep_embed"][0] * quirk)
    shifted = params | {"head": head | {"channel_embed": embed}}
    logits = np.asarray(run(shifted, feature, drawn))
    in_channel_order = np.asarray(drawn)[:, TINY.channel_order]
    chosen = np.take_along_axis(logits, in_channel_order[..., None], axis=-1)[..., 0]
    regret = logits.max(axis=-1) - chosen
    if dtype == "float32":
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), in_channel_order)
        expected = chosen - special.logsumexp(logits.astype(np.float64), axis=-1)
        np.testing.assert_allclose(log_probs, expected.sum(axis=-1), atol=1e-4)
    else:
        # bfloat16 logits of about 10 have errors of about 0.1: the choice is at most that bad.
        assert regret.max() < 0.02 * np.abs(logits).max()
    # The test is not trivial: every level occurs, and the quirk changes some indices.
    assert len(np.unique(drawn)) == TINY.levels
    if quirk:
        plain = np.asarray(run(params, feature, drawn))
        assert (np.argmax(plain, axis=-1) != in_channel_order).any()
    if quirk and dtype == "float32":
        sampled = head_method(config, "logits", as_sampled=True)(params, feature, drawn)
        np.testing.assert_allclose(sampled, logits, atol=1e-5 * np.abs(logits).max())


def test_noise_of_positions_channels_and_samples_is_independent(params):
    """At a huge temperature only noise decides, and every pair of draws must be independent."""
    count = 500
    settings = SamplingSettings(3, temperature=1e6)
    request = Request(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), seed=5)
    drawn = np.asarray(generate(TINY, params, request, settings))
    levels, flat = TINY.levels, drawn.reshape(count, -1)
    assert stats.chisquare(np.bincount(flat.ravel(), minlength=levels)).pvalue > 1e-3
    values = []
    for i in range(flat.shape[1]):
        # Against the earlier draws of the same sample, and the same draw of the next sample.
        for other in (*flat[:, :i].T, np.roll(flat[:, i], 1)):
            pairs = np.bincount(flat[:, i] * levels + other, minlength=levels**2)
            values.append(stats.chisquare(pairs).pvalue)
    # Of n uniform p-values, the smallest is above 0.001 / n with probability 0.999.
    assert min(values) > 1e-3 / len(values)
    assert 0.4 < np.mean(values) < 0.6
