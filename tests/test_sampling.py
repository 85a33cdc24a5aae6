"""Sampling against simple code: the reveal loop; other images change nothing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from test_schedule import published_schedule
from tiny_model import (
    TINY,
    equations,
    head_method,
    jitted,
    lay_out,
    program_flops,
    random_batch,
    random_params,
    tiny,
)

from tokenbridge_jax.model import TokenBridge, abstract_params, prepare_params
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.sampling import sampler
from tokenbridge_jax.sampling.batches import generate_in_batches
from tokenbridge_jax.sampling.orders import random_orders
from tokenbridge_jax.sampling.sampler import Known, Request, generate, generate_steps
from tokenbridge_jax.sampling.schedule import SamplingSettings, hidden_counts, make_plan

GREEDY = SamplingSettings(num_iter=4, temperature=0.0)


# --- The reveal loop ------------------------------------------------------------------------------


class Recorder:
    """Replaces the model: the index that it draws at a slot records its input at this slot.

    Channels: how often the slot was drawn, its position, the number of hidden positions, and
    whether exactly the slots before `num_hidden` had never been drawn.
    """

    def __init__(self, config, sampling):
        assert sampling

    def apply(self, variables, *arguments, method):
        return method(*arguments)

    @staticmethod
    def features(visible, labels, order, num_hidden, drop_class, window):
        unseen = order.shape[1] - visible.shape[1]
        indices = jnp.pad(visible, ((0, 0), (unseen, 0), (0, 0)))
        hidden = jnp.arange(order.shape[1])[None] < num_hidden
        consistent = ((indices[..., 0] == 0) == hidden).all(axis=1, keepdims=True)
        shown = [indices[..., 0] + 1, order, num_hidden, consistent]
        shown = [jnp.broadcast_to(x, order.shape) for x in shown]
        return window.cut(jnp.stack(shown, axis=-1).astype(jnp.float32))

    @staticmethod
    def sample_positions(feature, keys, temperature, guidance):
        return feature.astype(jnp.int32), None


@pytest.mark.parametrize(
    ("positions", "num_iter"),
    [(1, 1), (1, 4), (2, 1), (7, 3), (7, 7), (7, 30), (16, 5), (64, 9), (64, 64), (256, 6)],
)
def test_every_position_is_drawn_once_with_the_state_of_its_step(
    monkeypatch, positions: int, num_iter: int
):
    monkeypatch.setattr(sampler, "TokenBridge", Recorder)
    # No other test has this many classes, so no jitted program of the real model is used.
    config = tiny(positions=positions, classes=977, scan_layers=False)
    numbers = np.arange(2, dtype=np.int32)
    settings = SamplingSettings(num_iter)
    indices = np.asarray(generate(config, {}, Request(numbers, numbers, seed=3), settings))
    times, position, num_hidden, consistent = np.moveaxis(indices, -1, 0)
    assert (times == 1).all()
    assert consistent.all()
    np.testing.assert_array_equal(position, np.tile(np.arange(positions), (2, 1)))

    # Each step reveals as many positions as the schedule says, from the end of the image's order.
    order = np.asarray(random_orders(3, jnp.asarray(numbers), positions))
    assert (np.sort(order) == np.arange(positions)).all()
    revealed, _ = published_schedule(positions, num_iter)
    before = positions - np.cumsum([0, *revealed[:-1]])
    expected = np.repeat(before, revealed)[::-1]  # By slot: the last slot is revealed first.
    by_slot = np.take_along_axis(num_hidden, order, axis=1)
    np.testing.assert_array_equal(by_slot, np.tile(expected, (2, 1)))


def test_orders_of_samples_are_independent_uniform_permutations():
    orders = np.asarray(jax.jit(lambda i: random_orders(0, i, 4))(jnp.arange(4800)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def brute_force(config, params, request: Request, settings, scales=None) -> np.ndarray:
    """One image and one step at a time, with positions by number and without caches or padding.

    Without `scales`, guidance is linear in the share of positions that are revealed. Where the null
    branch rests, its features follow those of the class, as far apart as when it last ran.
    """
    positions = config.positions
    known = request.known
    if known is None:
        shape = len(request.labels), positions
        known = Known(np.zeros((*shape, config.channels)), np.ones(shape, bool), positions)
    counts = [known.num_hidden, *hidden_counts(known.num_hidden, settings.num_iter).tolist()]
    if scales is None:
        revealed = (positions - np.maximum(counts[1:], 1)) / positions
        scales = 1 + (settings.guidance - 1) * revealed
    images = np.where(known.hidden[:, :, None], 0, known.values).astype(np.int32)
    for image, label, number, mask in zip(images, *request[:2], known.hidden, strict=True):
        key = jax.random.fold_in(jax.random.key(request.seed), number)
        order_key, index_key = jax.random.split(key)
        shuffled = np.asarray(jax.random.permutation(order_key, positions))
        order = range(positions)[::-1] if settings.order == "raster" else shuffled
        queue = [int(p) for p in order if mask[p]]  # The last is next.
        keys = {p: jax.random.fold_in(index_key, p) for p in queue}
        noise, choice = {}, {}
        for p, key in keys.items():
            folded = [jax.random.fold_in(key, place) for place in range(config.channels + 1)]
            noise[p] = [np.asarray(jax.random.gumbel(k, config.levels)) for k in folded[:-1]]
            choice[p] = float(jax.random.gumbel(folded[-1]))
        apart, guided_steps = np.zeros((positions, config.decoder_width)), 0
        for scale, left in zip(scales, counts[1:], strict=True):
            visible = [p for p in range(positions) if p not in queue]
            slots = np.array([[*queue, *visible]])
            arguments = image[slots[0]][None], np.array([label]), slots, np.int32(len(queue))
            features = functools.partial(jitted(config, "features"), params, *arguments)
            feature = features(np.array([False]))[0]
            if scale != 1:
                if guided_steps % settings.guidance_every == 0:
                    apart[slots[0]] = feature - features(np.array([True]))[0]
                null = feature - apart[slots[0]]
                feature = null + np.float32(scale) * (feature - null)
                guided_steps += 1
            drawn, log_probs = image.copy(), dict.fromkeys(queue, 0.0)
            for place, channel in enumerate(config.channel_order):
                logits = head_method(config, "logits")(params, feature, drawn[slots[0]])
                for row, p in zip(np.asarray(logits)[:, place], queue, strict=False):
                    drawn[p, channel] = np.argmax(row + settings.temperature * noise[p][place])
                    tempered = special.log_softmax(row / (settings.temperature or 1))
                    log_probs[p] += tempered[drawn[p, channel]]
            if settings.order == "confidence":
                queue.sort(key=lambda p: log_probs[p] + settings.choice_temperature * choice[p])
            for p in queue[left:]:
                image[p] = drawn[p]
            del queue[left:]
        assert not queue
    return images


CONSTANT = dict(guidance=2.0, guidance_schedule="constant")


@pytest.mark.parametrize(
    ("positions", "settings", "scales"),
    [
        (8, dict(num_iter=3, guidance=1.0), [1, 1, 1]),
        (8, dict(CONSTANT, num_iter=2), [2, 2]),
        # 8, 5 and 0 positions are hidden before and after the steps; 0 counts as 1.
        (8, dict(num_iter=2, guidance=2.6, temperature=0.0), [1 + 1.6 * 3 / 8, 1 + 1.6 * 7 / 8]),
        # Three stages of encoder slots: 16, 32, 40. Revealed before each step: 0, 3, 12, 25.
        (40, dict(num_iter=4, guidance=2.0), [1 + 3 / 40, 1 + 12 / 40, 1 + 25 / 40, 1 + 39 / 40]),
        (40, dict(CONSTANT, num_iter=4, guidance_interval=(0.05, 0.6)), [1, 2, 2, 1]),
        # The null branch runs in the second and the fifth step, in other stages than it is used.
        (
            40,
            dict(CONSTANT, num_iter=6, guidance_interval=(0.01, 0.9), guidance_every=3),
            [1, 2, 2, 2, 2, 2],
        ),
    ],
)
def test_images_are_those_of_brute_force(positions: int, settings: dict, scales: list[float]):
    config = tiny(positions=positions)
    params = random_params(config)
    settings = SamplingSettings(**{"temperature": 0.8} | settings)
    labels = random_batch(config, 3, seed=7)["labels"]
    request = Request(labels, np.array([4, 0, 9], np.int32), seed=13)
    expected = brute_force(config, params, request, settings, scales)
    assert len({image.tobytes() for image in expected}) == 3
    np.testing.assert_array_equal(generate(config, params, request, settings), expected)


def test_guidance_1_does_not_use_the_null_latent_and_guidance_0_not_the_class(params):
    labels, numbers = np.tile(np.arange(3, dtype=np.int32), 2), np.arange(6, dtype=np.int32)
    request = Request(labels, numbers, orders=jnp.tile(jnp.arange(TINY.positions), (6, 1)))
    backbone = params["backbone"] | {"null_latent": jnp.full((1, 16), jnp.nan)}
    plain = np.asarray(generate(TINY, params, request, GREEDY))
    # Before the 4 steps, 0, 1, 3 and 5 of 8 positions are revealed.
    late = dataclasses.replace(GREEDY, guidance=2.0, guidance_interval=(0.7, 1.0))
    for settings in (GREEDY, late):
        without_null = generate(TINY, params | {"backbone": backbone}, request, settings)
        np.testing.assert_array_equal(without_null, plain)
    # The orders are equal and nothing is random, so images differ only by their class.
    assert len({image.tobytes() for image in plain}) == 3
    null = dataclasses.replace(GREEDY, guidance=0.0, guidance_schedule="constant")
    unconditional = np.asarray(generate(TINY, params, request, null))
    assert len({image.tobytes() for image in unconditional}) == 1


def test_steps_without_guidance_do_not_compute_the_null_branch():
    """Every step reveals one of 8 positions, so all steps of a kind have equally many products."""

    def flops(**settings) -> int:
        given = SamplingSettings(8, **settings)
        request = Request(jnp.zeros(2, jnp.int32), np.arange(2, dtype=np.int32))
        run = functools.partial(generate, TINY, request=request, settings=given)
        return program_flops(jax.make_jaxpr(run)(abstract_params(TINY)).jaxpr)

    plain, guided = flops(), flops(guidance=2.0)
    assert guided > 1.5 * plain
    for interval, share in (((0.0, 0.5), 1 / 2), ((0.75, 1.0), 1 / 4)):
        found = flops(guidance=2.0, guidance_interval=interval)
        assert found - plain == share * (guided - plain)


def test_steps_between_those_of_the_null_branch_do_not_compute_it():
    settings = SamplingSettings(8, guidance=2.0, guidance_every=3)
    request = Request(jnp.zeros(2, jnp.int32), np.arange(2, dtype=np.int32))
    run = functools.partial(generate, TINY, request=request, settings=settings)
    program = jax.make_jaxpr(run)(abstract_params(TINY)).jaxpr
    conditions = [eqn.params for _, eqn in equations(program) if eqn.primitive.name == "cond"]
    (choice,) = (params for params in conditions if not params.get("branches_platforms"))
    rests, runs = (program_flops(branch.jaxpr) for branch in choice["branches"])
    assert 0 < 2 * rests < runs  # It also runs the last layer for all positions.


# --- Images do not depend on other images, batches or devices -------------------------------------

STOCHASTIC = SamplingSettings(num_iter=3, guidance=1.8, temperature=0.9)


@pytest.fixture(scope="module")
def eight(params):
    """A request for sample indices 0..7, and its images."""
    labels = random_batch(TINY, 8, seed=9)["labels"]
    request = Request(labels, np.arange(8, dtype=np.int32), seed=21)
    return request, np.asarray(generate(TINY, params, request, STOCHASTIC))


def test_an_image_depends_on_seed_sample_index_and_label_alone(params, eight):
    request, images = eight
    assert len({image.tobytes() for image in images}) == 8
    # The same eight in another order; the program is the same.
    shuffled = np.random.default_rng(0).permutation(8).astype(np.int32)
    again = Request(request.labels[shuffled], shuffled, 21)
    np.testing.assert_array_equal(generate(TINY, params, again, STOCHASTIC), images[shuffled])
    # Another label changes the image of this label only.
    other = request.labels.copy()
    other[3] = (other[3] + 1) % TINY.classes
    changed = generate(TINY, params, request._replace(labels=other), STOCHASTIC)
    assert (changed != images).any(axis=(1, 2)).tolist() == [i == 3 for i in range(8)]
    # Another seed changes all.
    reseeded = generate(TINY, params, request._replace(seed=22), STOCHASTIC)
    assert (reseeded != images).any(axis=(1, 2)).all()


def test_few_images_on_a_gpu_have_programs_that_compile_faster(params, eight, monkeypatch):
    """The CPU's compiler knows the option too, and it changes nothing here."""
    request, images = eight
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, quick = sampler._generate
    compiled = quick._cache_size()
    np.testing.assert_array_equal(generate(TINY, params, request, STOCHASTIC), images)
    assert quick._cache_size() == compiled + 1
    # Not of more images, and not inside another program, which would be an error.
    generate(TINY, params, Request(np.arange(9) % 2, np.arange(9)), STOCHASTIC)
    inner = jax.jit(lambda x: generate(TINY, params, request, STOCHASTIC) + x)
    np.testing.assert_array_equal(inner(1), images + 1)
    assert quick._cache_size() == compiled + 1


def test_programs_that_compile_faster_have_two_stages(monkeypatch):
    config = tiny(positions=40)
    params = random_params(config)
    request = Request(np.array([0, 1], np.int32), np.arange(2, dtype=np.int32), 5)
    settings = SamplingSettings(num_iter=4, temperature=0.8, guidance=2.0)
    plans = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(sampler, "make_plan", lambda *x: plans.append(make_plan(*x)) or plans[-1])
    scales = [1 + revealed / 40 for revealed in (3, 12, 25, 39)]
    expected = brute_force(config, params, request, settings, scales)
    np.testing.assert_array_equal(generate(config, params, request, settings), expected)
    *_, (_, _, last) = generate_steps(config, params, request, settings)
    np.testing.assert_array_equal(last, expected)
    assert [[stage.visible_slots for stage in plan.stages] for plan in plans] == [[20, 40]] * 2


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_changes_nothing(params, eight, size: int):
    request, images = eight
    chosen = np.array([6, 2, 5], np.int32)[:size]
    alone = generate(TINY, params, Request(request.labels[chosen], chosen, 21), STOCHASTIC)
    np.testing.assert_array_equal(alone, images[chosen])


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [
        ((8, 1, 1), 8),
        ((1, 8, 1), 8),
        ((2, 2, 2), 3),
        ((1, 2, 4), 7),
        ((1, 1, 2), 7),
        ((1, 1, 1), 5),
    ],
)
def test_devices_change_nothing(params, eight, sizes, batch_size: int):
    """In batches, of which the last is padded, with parameters split over the mesh."""
    request, images = eight
    mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    drawn = generate_in_batches(
        TINY,
        lay_out(params, TINY, mesh),
        request.labels[:7],
        STOCHASTIC,
        mesh,
        seed=21,
        batch_size=batch_size,
    )
    np.testing.assert_array_equal(drawn, images[:7])


def test_differences_of_the_branches_stay_with_their_images_on_a_mesh(params, eight):
    request, _ = eight
    settings = dataclasses.replace(STOCHASTIC, num_iter=5, guidance_every=2)
    expected = np.asarray(generate(TINY, params, request, settings))
    mesh = meshes.make_mesh(2, 2, 2)
    drawn = generate_in_batches(
        TINY, lay_out(params, TINY, mesh), request.labels, settings, mesh, seed=21, batch_size=4
    )
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
    "changes", [{"remat": "dots"}, {"remat": "full"}, {"scan_layers": not TINY.scan_layers}]
)
def test_how_layers_were_trained_does_not_change_samples(params, changes: dict):
    request = Request(np.zeros(2, np.int32), np.arange(2))
    for settings in (GREEDY, STOCHASTIC):
        expected = generate(TINY, params, request, settings)
        found = generate(tiny(**changes), params, request, settings)
        np.testing.assert_array_equal(found, expected)


def test_a_decoder_of_one_layer_is_its_last():
    request = Request(np.zeros(2, np.int32), np.arange(2))
    scanned, unrolled = (tiny(decoder_layers=1, scan_layers=scan) for scan in (True, False))
    params = random_params(scanned)
    np.testing.assert_array_equal(
        generate(scanned, params, request, STOCHASTIC),
        generate(unrolled, params, request, STOCHASTIC),
    )


def test_weights_are_cast_before_the_loops_and_nothing_else_changes():
    config = tiny(dtype="bfloat16")
    params = random_params(config)
    batch = random_batch(config, 3)
    arguments = *batch.values(), np.int32(5), np.zeros(3, bool)
    model = TokenBridge(config, sampling=True)
    logits = jax.jit(lambda params, *arguments: model.apply({"params": params}, *arguments))
    exact = logits(prepare_params(params, dataclasses.replace(config, dtype="float32")), *arguments)
    np.testing.assert_array_equal(logits(prepare_params(params, config), *arguments), exact)

    run = lambda *arrays: generate(config, params, Request(*arrays), STOCHASTIC)  # noqa: E731
    program = jax.make_jaxpr(run)(jnp.zeros(7, jnp.int32), np.arange(7, dtype=np.int32))
    weights = {leaf.shape[-n:] for leaf in jax.tree.leaves(params) for n in range(1, leaf.ndim + 1)}
    casts = [
        (times, eqn.invars[0].aval)
        for times, eqn in equations(program.jaxpr)
        if eqn.primitive.name == "convert_element_type"
    ]
    of_weights = [times for times, x in casts if x.shape in weights and x.dtype == jnp.float32]
    assert of_weights
    assert set(of_weights) == {1}


def test_data_parallel_sampling_needs_no_communication(params):
    """In a program for eight devices with whole parameters, no device waits for another."""
    mesh = meshes.make_mesh(data=8)
    settings = SamplingSettings(num_iter=3, guidance=2.0)
    images = np.zeros(16, np.int32), np.arange(16, dtype=np.int32)
    run = lambda params, *arrays: generate(TINY, params, Request(*arrays), settings)  # noqa: E731
    with meshes.use_mesh(mesh):
        arguments = (
            jax.device_put(params, meshes.replicated(mesh)),
            *jax.device_put(images, meshes.batch_sharding(mesh)),
        )
        program = jax.jit(run).lower(*arguments).compile().as_text()
    assert "num_partitions=8" in program
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in collectives if f" {name}(" in program]
