"""Settings of sampling, schedules and stages against simple code."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.schedule import (
    SamplingSettings,
    guidance_scales,
    hidden_counts,
    make_plan,
    make_settings,
)

GRID = [(p, n) for p in (1, 2, 7, 16, 64, 256) for n in (1, 2, 3, 5, 6, 8, 9, 64, 255, 256, 300)]


def published_schedule(positions: int, num_iter: int) -> tuple[list[int], list[int]]:
    """Positions revealed in every step, and `hidden_next`, as in the official code.

    The cosine of a rational multiple of pi is rational only at 0, 1/2 and 1 (Niven). Elsewhere a
    float64 floor is safe, and the value 1/2 is exact here.
    """
    current, revealed, counts = positions, [], []
    for step in range(num_iter):
        share = Fraction(step + 1, num_iter)
        cosine = {Fraction(2, 3): 0.5, Fraction(1): 0.0}.get(share, math.cos(math.pi / 2 * share))
        hidden_next = max(1, min(current - 1, math.floor(positions * cosine)))
        revealed.append(current if step == num_iter - 1 else current - hidden_next)
        counts.append(hidden_next)
        current = hidden_next
    return revealed, counts


@pytest.mark.parametrize(("positions", "num_iter"), GRID)
def test_schedule_is_the_published_one(positions: int, num_iter: int):
    revealed, counts = published_schedule(positions, num_iter)
    assert sum(revealed) == positions
    # With more steps than positions, the reference has steps that reveal nothing; ours has none.
    expected = [count for count in revealed if count]
    ours = hidden_counts(positions, num_iter)
    assert (-np.diff([positions, *ours])).tolist() == expected
    assert ours[-1] == 0
    assert len(ours) == min(num_iter, positions)

    settings = SamplingSettings(num_iter, guidance=3.1)
    kept = np.array(counts)[np.array(revealed) > 0]
    linear = 1 + 2.1 * (positions - kept) / positions
    np.testing.assert_allclose(guidance_scales(positions, settings), linear, rtol=1e-6)
    constant = dataclasses.replace(settings, guidance_schedule="constant")
    scales = guidance_scales(positions, constant)
    np.testing.assert_array_equal(scales, np.full(len(kept), np.float32(3.1)), strict=True)


def test_thirds_are_floored_in_float64():
    assert hidden_counts(256, 3).tolist() == [221, 128, 0]
    assert 128 in hidden_counts(256, 9)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_iter", 0, r"sampling\.num_iter=0 must be at least 1"),
        ("temperature", -0.1, r"sampling\.temperature=-0\.1 must be 0 or more"),
        ("temperature", math.nan, r"sampling\.temperature=nan must be 0 or more"),
        ("temperature", math.inf, r"sampling\.temperature=inf must be 0 or more"),
        ("guidance", math.nan, r"sampling\.guidance=nan must be finite"),
        ("guidance", math.inf, r"sampling\.guidance=inf must be finite"),
        ("guidance_schedule", "cosine", r"'cosine' is not one of linear, constant"),
        ("guidance_every", 0, r"sampling\.guidance_every=0 must be at least 1"),
        ("guidance_every", 1.5, r"guidance_every=1\.5 must be a whole number"),
        ("guidance_interval", (0.5, 0.5), r"sampling\.guidance_interval=\(0\.5, 0\.5\) must be"),
        ("guidance_interval", (-0.1, 1.0), r"must be two shares, 0 <= from < to <= 1"),
        ("guidance_interval", (0.0, 1.1), r"must be two shares"),
        ("guidance_interval", (0.0, math.nan), r"must be two shares"),
        ("guidance_interval", (0.0, 0.5, 1.0), r"must be two shares"),
    ],
)
def test_settings_out_of_range_are_named(field: str, value, message: str):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**{field: value})


def test_unknown_settings_are_named():
    assert make_settings({"num_iter": 3}) == SamplingSettings(num_iter=3)
    with pytest.raises(UserError, match="temprature is no setting of sampling; these are: num_it"):
        make_settings({"temprature": 1})


@pytest.mark.parametrize(("positions", "num_iter"), GRID)
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_stages_are_large_enough_for_every_step(positions: int, num_iter: int, order: str):
    """Exactly for whole images, and at least for edits with any number of hidden positions."""
    settings = SamplingSettings(num_iter, 2.0, guidance_interval=(0.2, 0.7), order=order)
    plans = [make_plan(positions, settings)]
    some = {*range(1, positions + 1, 1 + positions // 10), positions}
    for plan in plans + [make_plan(positions, settings, num_hidden) for num_hidden in some]:
        before, after = np.array(plan.hidden[:-1]), np.array(plan.hidden[1:])
        assert after.tolist() == hidden_counts(plan.hidden[0], num_iter).tolist()
        visible = positions - before
        drawn = before if order == "confidence" else before - after
        guided = (visible / positions >= 0.2) & (visible / positions < 0.7)
        assert len(plan.stages) <= min(8, -(-positions // 16)) + 2
        assert plan.ends[-1] == len(before)
        for stage, first, end in zip(plan.stages, (0, *plan.ends), plan.ends, strict=False):
            steps = np.s_[first:end]
            assert stage.visible_slots == positions or stage.visible_slots % 16 == 0
            assert (visible[steps] <= stage.visible_slots).all()
            assert (guided[steps] == stage.guided).all()
            assert (drawn[steps] <= stage.reveals).all()
            if plan is plans[0]:
                assert stage.reveals == drawn[steps].max()


@pytest.mark.parametrize("num_iter", [9, 64, 256])
def test_edits_share_a_few_sets_of_stages(num_iter: int):
    settings = SamplingSettings(num_iter, guidance=3.1)
    stages = [make_plan(256, settings, num_hidden).stages for num_hidden in range(1, 257)]
    changes = [n + 1 for n in range(1, 256) if stages[n] != stages[n - 1]]
    assert changes == [33, 65, 129]
    assert [len(stages[n - 1]) for n in (32, 64, 128, 256)] == [2, 3, 5, 8]


@pytest.mark.parametrize(("num_iter", "expected"), [(256, 3.0), (64, 4.1)])
def test_stages_pad_little(num_iter: int, expected: float):
    """Per token and branch, encoder and decoder have 16 x 12 products; the head has 16 x 4 x 18."""
    plan = make_plan(256, SamplingSettings(num_iter, guidance=2.0))
    before = np.array(plan.hidden)
    visible, reveals = 256 - before[:-1], -np.diff(before)
    assert len(plan.stages) == 8
    encoder, head = 2 * 16 * 12, 16 * 4 * 18
    work = np.sum(encoder * (64 + visible) + head * reveals + encoder * (64 + 256))
    steps = np.diff([0, *plan.ends])
    sizes = np.array([(stage.visible_slots, stage.reveals) for stage in plan.stages])
    padding = steps @ sizes @ [encoder, head] - encoder * visible.sum() - head * reveals.sum()
    assert 100 * padding / work == pytest.approx(expected, abs=0.05)
