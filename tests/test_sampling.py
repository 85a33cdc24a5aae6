"""Sampling against brute force: schedules, the reveal loop, cached channels, randomness."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tiny_model import TINY, in_order, random_batch, random_params, tiny

from tokenbridge_jax import parallel, sampling
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.model import TokenBridge, init_params
from tokenbridge_jax.pipeline import sample_indices
from tokenbridge_jax.sampling import (
    SamplingSettings,
    generate,
    guidance_scales,
    hidden_counts,
    random_orders,
)

GREEDY = SamplingSettings(num_iter=4, temperature=0.0)
GRID = [(p, n) for p in (1, 2, 7, 16, 64, 256) for n in (1, 2, 3, 5, 6, 8, 9, 64, 255, 256, 300)]


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


# --- Schedules ------------------------------------------------------------------------------------


def _published_schedule(positions: int, num_iter: int) -> tuple[list[int], list[int]]:
    """Positions revealed in every step, and `hidden_next`, as official-behaviour states them.

    The cosine of a rational multiple of pi is rational only at 0, 1/2 and 1 (Niven): elsewhere a
    float64 floor is safe, and at 1/2 it is taken exactly.
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
    revealed, counts = _published_schedule(positions, num_iter)
    assert sum(revealed) == positions
    # Steps of the reference that reveal nothing (more steps than positions) are left out here.
    expected = [count for count in revealed if count]
    ours = hidden_counts(positions, num_iter)
    assert (-np.diff([positions, *ours])).tolist() == expected
    assert ours[-1] == 0
    assert len(ours) == min(num_iter, positions)

    settings = SamplingSettings(num_iter, guidance=3.1)
    kept = [count for count, reveals in zip(counts, revealed, strict=True) if reveals]
    linear = [1 + 2.1 * (positions - hidden_next) / positions for hidden_next in kept]
    np.testing.assert_allclose(guidance_scales(positions, settings), linear, rtol=1e-6)
    constant = dataclasses.replace(settings, guidance_schedule="constant")
    np.testing.assert_array_equal(
        guidance_scales(positions, constant), np.full(len(kept), np.float32(3.1))
    )


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
    ],
)
def test_settings_out_of_range_are_named(field: str, value, message: str):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**{field: value})


# --- The reveal loop ------------------------------------------------------------------------------


class Recorder:
    """Stands in for the model: the index it draws at a slot tells what it was shown there.

    Channels: how often the slot was drawn before, its position, how many were hidden, and whether
    exactly the slots before `num_hidden` had never been drawn.
    """

    def __init__(self, config):
        pass

    def apply(self, variables, *arguments, method):
        return method(*arguments)

    @staticmethod
    def features(indices, labels, order, num_hidden, drop_class):
        hidden = jnp.arange(order.shape[1])[None] < num_hidden
        consistent = ((indices[..., 0] == 0) == hidden).all(axis=1, keepdims=True)
        shown = [indices[..., 0] + 1, order, num_hidden, consistent]
        shown = [jnp.broadcast_to(x, order.shape) for x in shown]
        return jnp.stack(shown, axis=-1).astype(jnp.float32)

    @staticmethod
    def sample_positions(feature, keys, temperature):
        return feature.astype(jnp.int32)


@pytest.mark.parametrize(
    ("positions", "num_iter"),
    [(1, 1), (1, 4), (2, 1), (7, 3), (7, 7), (7, 30), (16, 5), (64, 9), (64, 64), (256, 6)],
)
def test_every_position_is_drawn_once_with_the_state_of_its_step(
    monkeypatch, positions: int, num_iter: int
):
    monkeypatch.setattr(sampling, "TokenBridge", Recorder)
    # No other test has this many classes: the jitted program is not shared with the real model.
    config = tiny(positions=positions, classes=977)
    numbers = np.arange(2, dtype=np.int32)
    settings = SamplingSettings(num_iter)
    indices = np.asarray(generate(config, {}, numbers, numbers, settings, seed=3))
    times, position, num_hidden, consistent = np.moveaxis(indices, -1, 0)
    assert (times == 1).all()
    assert consistent.all()
    np.testing.assert_array_equal(position, np.tile(np.arange(positions), (2, 1)))

    # From the end of each image's order: as many a step as the schedule says.
    order = np.asarray(random_orders(3, jnp.asarray(numbers), positions))
    assert (np.sort(order) == np.arange(positions)).all()
    revealed, _ = _published_schedule(positions, num_iter)
    before = positions - np.cumsum([0, *revealed[:-1]])
    expected = np.repeat(before, revealed)[::-1]  # By slot: the last slot is revealed first.
    np.testing.assert_array_equal(np.take_along_axis(num_hidden, order, axis=1)[0], expected)
    np.testing.assert_array_equal(np.take_along_axis(num_hidden, order, axis=1)[1], expected)


def test_orders_are_uniform_permutations_of_their_own():
    orders = np.asarray(jax.jit(lambda i: random_orders(0, i, 4))(jnp.arange(4800)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def _features(params, indices, labels, order, num_hidden, drop: bool):
    return TokenBridge(TINY).apply(
        {"params": params},
        indices,
        labels,
        order,
        num_hidden,
        jnp.full(len(labels), drop),
        method="features",
    )


_features = jax.jit(_features, static_argnames="drop")
_head_logits = jax.jit(
    lambda params, feature, indices: TokenBridge(TINY).apply(
        {"params": params}, method=lambda model: model.head.logits(feature, indices)
    )
)


@pytest.mark.parametrize(
    ("guidance", "schedule"), [(1.0, "linear"), (2.5, "linear"), (2.5, "constant")]
)
def test_greedy_images_are_what_recomputing_every_step_gives(params, guidance, schedule):
    """No cache, no window, no slices: the whole model again at each step on the final indices."""
    settings = dataclasses.replace(GREEDY, guidance=guidance, guidance_schedule=schedule)
    count = 6
    batch = random_batch(TINY, count, seed=7)
    labels, order = batch["labels"], jnp.asarray(batch["order"])
    numbers = np.arange(count, dtype=np.int32)
    drawn = np.asarray(generate(TINY, params, labels, numbers, settings, orders=order))
    assert len({image.tobytes() for image in drawn}) == count
    slots = jnp.asarray(in_order(drawn, batch["order"]))

    revealed, counts = _published_schedule(TINY.positions, settings.num_iter)
    hidden = TINY.positions
    checked = 0
    for reveals, hidden_next in zip(revealed, counts, strict=True):
        scale = guidance
        if schedule == "linear":
            scale = 1 + (guidance - 1) * (TINY.positions - hidden_next) / TINY.positions
        arguments = slots, jnp.asarray(labels), order, jnp.int32(hidden)
        conditional = _features(params, *arguments, drop=False)
        null = _features(params, *arguments, drop=True)
        feature = null + scale * (conditional - null)
        logits = _head_logits(params, feature.reshape(-1, TINY.decoder_width), slots.reshape(-1, 4))
        best = np.argmax(logits, axis=-1).reshape(count, TINY.positions, TINY.channels)
        now = np.s_[:, hidden - reveals : hidden]
        np.testing.assert_array_equal(np.asarray(slots)[..., TINY.channel_order][now], best[now])
        hidden -= reveals
        checked += reveals
    assert checked == TINY.positions


def test_guidance_1_never_looks_at_the_null_latent_and_0_never_at_the_class(params):
    labels, numbers = np.tile(np.arange(3, dtype=np.int32), 2), np.arange(6, dtype=np.int32)
    orders = jnp.tile(jnp.arange(TINY.positions), (6, 1))
    poisoned = params | {
        "backbone": params["backbone"] | {"null_latent": jnp.full((1, 16), jnp.nan)}
    }
    plain = np.asarray(generate(TINY, params, labels, numbers, GREEDY, orders=orders))
    with_poison = generate(TINY, poisoned, labels, numbers, GREEDY, orders=orders)
    np.testing.assert_array_equal(with_poison, plain)
    # The orders are equal and nothing is random: only the class makes images differ.
    assert len({image.tobytes() for image in plain}) == 3
    null = dataclasses.replace(GREEDY, guidance=0.0, guidance_schedule="constant")
    unconditional = np.asarray(generate(TINY, params, labels, numbers, null, orders=orders))
    assert len({image.tobytes() for image in unconditional}) == 1


# --- One position through the head ----------------------------------------------------------------


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
        variables = {"params": params | {"head": head}}
        run = lambda model: getattr(model.head, method)(*arguments)  # noqa: E731
        return TokenBridge(config).apply(variables, method=run)

    drawn = jax.jit(lambda head: apply(head, "sample", feature, keys, jnp.float32(0)))(head)
    shifted = head | {
        "channel_embed": head["channel_embed"].at[0].add(head["timestep_embed"][0] * quirk)
    }
    logits = np.asarray(jax.jit(lambda head: apply(head, "logits", feature, drawn))(shifted))
    in_channel_order = np.asarray(drawn)[:, TINY.channel_order]
    chosen = np.take_along_axis(logits, in_channel_order[..., None], axis=-1)[..., 0]
    regret = logits.max(axis=-1) - chosen
    if dtype == "float32":
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), in_channel_order)
    else:
        # Logits of size ~10 in bfloat16 carry errors of ~0.1: the choice is at most that bad.
        assert regret.max() < 0.02 * np.abs(logits).max()
    # Far from trivial: every level occurs, and the quirk changes some of them.
    assert len(np.unique(drawn)) == TINY.levels
    if quirk:
        plain = np.asarray(jax.jit(lambda head: apply(head, "logits", feature, drawn))(head))
        assert (np.argmax(plain, axis=-1) != in_channel_order).any()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_draws_have_the_probabilities_of_the_tempered_softmax(temperature: float):
    """Chi-square over all pairs of the first two channels, and over the last, of one position.

    Through `generate`, so that keys made from seed and sample index are what is tested.
    """
    config = tiny(positions=1)
    params = random_params(config, seed=1, spread=0.15)
    count = 6000
    labels = np.zeros(count, np.int32)
    settings = SamplingSettings(1, temperature=temperature)
    numbers = np.arange(count, dtype=np.int32)
    drawn = np.asarray(generate(config, params, labels, numbers, settings, seed=11))[:, 0]
    drawn = drawn[:, config.channel_order]

    # Exact probabilities of all 5^4 outcomes, from the training logits.
    levels = config.levels
    outcomes = np.stack(np.unravel_index(np.arange(levels**4), (levels,) * 4), axis=-1)
    images = outcomes[:, np.argsort(config.channel_order)][:, None]
    logits = jax.jit(TokenBridge(config).apply)(
        {"params": params},
        jnp.asarray(images),
        jnp.zeros(len(images), jnp.int32),
        jnp.zeros((len(images), 1), jnp.int32),
        jnp.int32(1),
        jnp.zeros(len(images), bool),
    )
    log_probability = special.log_softmax(np.asarray(logits, np.float64)[:, 0] / temperature, -1)
    chosen = np.take_along_axis(log_probability, outcomes[..., None], axis=-1)[..., 0]
    joint = np.exp(chosen.sum(axis=-1))
    assert joint.sum() == pytest.approx(1)
    joint = joint.reshape((levels,) * 4)

    pairs, _ = np.histogramdd(drawn[:, :2], bins=[np.arange(levels + 1) - 0.5] * 2)
    expected = joint.sum(axis=(2, 3)) * count
    assert expected.min() > 5
    assert stats.chisquare(pairs.ravel(), expected.ravel()).pvalue > 1e-3
    last = np.bincount(drawn[:, 3], minlength=levels)
    assert stats.chisquare(last, joint.sum(axis=(0, 1, 2)) * count).pvalue > 1e-3
    # The test has the power to tell: another temperature is refused.
    other = np.exp(chosen.sum(axis=-1) * (1.4 if temperature < 1 else 0.7)).reshape((levels,) * 4)
    other = other.sum(axis=(2, 3)) * count / other.sum()
    assert stats.chisquare(pairs.ravel(), other.ravel()).pvalue < 1e-4


def test_noise_of_positions_channels_and_samples_is_independent(params):
    """At a huge temperature nothing but noise is left: every pair of draws must be independent."""
    count = 500
    settings = SamplingSettings(3, temperature=1e6)
    labels, numbers = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
    drawn = np.asarray(generate(TINY, params, labels, numbers, settings, seed=5))
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


# --- The same image whatever stands beside it -----------------------------------------------------

STOCHASTIC = SamplingSettings(num_iter=3, guidance=1.8, temperature=0.9)


@pytest.fixture(scope="module")
def eight(params):
    """Labels and images of sample indices 0..7."""
    labels = random_batch(TINY, 8, seed=9)["labels"]
    numbers = np.arange(8, dtype=np.int32)
    return labels, np.asarray(generate(TINY, params, labels, numbers, STOCHASTIC, seed=21))


def test_an_image_depends_on_seed_sample_index_and_label_alone(params, eight):
    labels, images = eight
    assert len({image.tobytes() for image in images}) == 8
    # Another order of the same eight: no new program.
    shuffled = np.random.default_rng(0).permutation(8).astype(np.int32)
    again = generate(TINY, params, labels[shuffled], shuffled, STOCHASTIC, seed=21)
    np.testing.assert_array_equal(again, images[shuffled])
    # Another label beside it changes that image only.
    other = labels.copy()
    other[3] = (other[3] + 1) % TINY.classes
    changed = np.asarray(
        generate(TINY, params, other, np.arange(8, dtype=np.int32), STOCHASTIC, seed=21)
    )
    assert (changed != images).any(axis=(1, 2)).tolist() == [i == 3 for i in range(8)]
    # Another seed changes all.
    reseeded = generate(TINY, params, labels, np.arange(8, dtype=np.int32), STOCHASTIC, seed=22)
    assert (np.asarray(reseeded) != images).any(axis=(1, 2)).all()


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_changes_nothing(params, eight, size: int):
    labels, images = eight
    chosen = np.array([6, 2, 5], np.int32)[:size]
    alone = generate(TINY, params, labels[chosen], chosen, STOCHASTIC, seed=21)
    np.testing.assert_array_equal(alone, images[chosen])


@pytest.mark.parametrize(("sizes", "batch_size"), [((8, 1, 1), 8), ((2, 2, 2), 3), ((1, 1, 1), 5)])
def test_devices_change_nothing(params, eight, sizes, batch_size: int):
    """Through the pipeline's batches, the last of them padded; parameters split over the mesh."""
    labels, images = eight
    mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    boxed = jax.eval_shape(lambda: init_params(TINY, jax.random.key(0)))
    placed = jax.device_put(params, parallel.logical_shardings(boxed, mesh))
    drawn = sample_indices(
        TINY, placed, labels[:7], STOCHASTIC, mesh, seed=21, batch_size=batch_size
    )
    np.testing.assert_array_equal(drawn, images[:7])


def test_data_parallel_sampling_needs_no_communication(params):
    """Compiled for eight devices with whole parameters, no device waits for another."""
    mesh = parallel.make_mesh(data=8)
    settings = SamplingSettings(num_iter=3, guidance=2.0)
    images = np.zeros(16, np.int32), np.arange(16, dtype=np.int32)
    with parallel.use_mesh(mesh):
        lowered = sampling._generate.lower(
            jax.device_put(params, parallel.replicated(mesh)),
            *jax.device_put(images, parallel.batch_sharding(mesh)),
            None,
            np.uint32(0),
            guidance_scales(TINY.positions, settings),
            np.float32(1),
            config=TINY,
            hidden=tuple(hidden_counts(TINY.positions, 3).tolist()),
            guided=True,
        )
    program = lowered.compile().as_text()
    assert "num_partitions=8" in program
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in collectives if f" {name}(" in program]
