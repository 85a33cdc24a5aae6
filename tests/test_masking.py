"""The draw of mask ratios compared with scipy's truncated normal; slots; orders."""

import collections

import jax
import numpy as np
import pytest
from scipy import stats

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.masking import MaskSampler, draw_orders

RATIO = stats.truncnorm((0.7 - 1) / 0.25, 0.0, loc=1.0, scale=0.25)


@pytest.mark.parametrize("positions", [16, 256])
def test_counts_follow_the_truncated_normal(positions):
    probabilities = MaskSampler(positions).probabilities()
    assert sum(probabilities.values()) == pytest.approx(1)
    for count, probability in probabilities.items():
        # ceil(ratio L) == count where ratio lies in ((count - 1) / L, count / L].
        expected = RATIO.cdf(count / positions) - RATIO.cdf((count - 1) / positions)
        assert probability == pytest.approx(expected, abs=1e-12)


def test_draws_have_that_distribution_and_depend_on_seed_and_step_alone():
    masks = MaskSampler(16)
    draws = [int(masks.draw(seed=3, step=step).num_hidden) for step in range(4000)]
    assert draws[:50] == [int(masks.draw(3, step).num_hidden) for step in range(50)]
    assert draws[:50] != [int(masks.draw(4, step).num_hidden) for step in range(50)]
    observed = collections.Counter(draws)
    probabilities = masks.probabilities()
    assert set(observed) == set(probabilities)
    expected = [4000 * p for p in probabilities.values()]
    assert stats.chisquare([observed[k] for k in probabilities], expected).pvalue > 1e-3


@pytest.mark.parametrize("bucket", [1, 16, 100, 256])
def test_slots_hold_every_draw_of_their_bucket_and_no_more_than_needed(bucket):
    masks = MaskSampler(256, bucket=bucket)
    by_bucket = collections.defaultdict(list)
    for count in range(masks.fewest_hidden, 257):
        draw = masks.slots(count)
        by_bucket[draw.hidden_slots, draw.visible_slots].append(count)
    for (hidden_slots, visible_slots), counts in by_bucket.items():
        assert hidden_slots == 256 or hidden_slots % bucket == 0
        assert max(counts) == hidden_slots
        assert visible_slots == 256 - min(counts)


@pytest.mark.parametrize(
    ("bucket", "programs", "hidden_percent", "visible_percent"),
    [
        (1, 77, 0.0, 0.0),
        (8, 10, 1.5, 3.4),
        (16, 5, 3.1, 7.1),
        (32, 3, 5.9, 13.3),
        (64, 2, 10.6, 24.1),
        (256, 1, 13.1, 30.3),
    ],
)
def test_documented_cost_of_buckets(bucket, programs, hidden_percent, visible_percent):
    masks = MaskSampler(256, bucket=bucket)
    counts = np.arange(masks.fewest_hidden, 257)
    chances = RATIO.cdf(counts / 256) - RATIO.cdf((counts - 1) / 256)
    draws = [masks.slots(int(count)) for count in counts]
    hidden = np.array([draw.hidden_slots for draw in draws])
    visible = np.array([draw.visible_slots for draw in draws])
    assert len(set(zip(hidden.tolist(), visible.tolist(), strict=True))) == programs
    unused_hidden = 1 - chances @ counts / (chances @ hidden)
    unused_visible = 1 - chances @ (64 + 256 - counts) / (chances @ (64 + visible))
    assert 100 * unused_hidden == pytest.approx(hidden_percent, abs=0.051)
    assert 100 * unused_visible == pytest.approx(visible_percent, abs=0.051)


def test_quantiles_are_those_of_the_distribution():
    expected = np.ceil(RATIO.ppf([0.125, 0.375, 0.625, 0.875]) * 256)
    assert MaskSampler(256).quantiles(4) == expected.tolist()


def test_orders_are_uniform_permutations():
    orders = np.asarray(draw_orders(jax.random.key(0), 6000, 4))
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    counts = collections.Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_impossible_settings_are_named():
    for values, message in (({"minimum": 0.0}, "mask_min"), ({"std": 0.0}, "mask_std")):
        with pytest.raises(UserError, match=message):
            MaskSampler(16, **values)
