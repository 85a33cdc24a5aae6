"""Compares editing and the sampling orders with brute force; tests `Pipeline.edit` on images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import brute_force
from tiny_model import random_batch, random_params, tiny

from tokenbridge_jax.codec import Codec
from tokenbridge_jax.model import init_params
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.editing import blend_images, hidden_positions
from tokenbridge_jax.pipeline.filling import fill_hidden
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling import sampler
from tokenbridge_jax.sampling.batches import generate_in_batches
from tokenbridge_jax.sampling.orders import ORDERS, random_orders
from tokenbridge_jax.sampling.sampler import Known, Request, generate, generate_steps
from tokenbridge_jax.sampling.schedule import SamplingSettings, hidden_counts

CONFIG = tiny(positions=16)
NUMBERS = np.array([4, 0, 9], np.int32)


@pytest.fixture(scope="module")
def params(pipeline):
    return pipeline.params


def _random_known(config, count: int, num_hidden: int, seed: int = 0) -> Known:
    """Images with `num_hidden` hidden positions each, which hold 255 instead of a valid index."""
    rng = np.random.default_rng(seed)
    hidden = np.arange(config.positions) < num_hidden
    hidden = np.stack([rng.permutation(hidden) for _ in range(count)])
    indices = random_batch(config, count, seed)["indices"].copy()
    indices[hidden] = 255
    return Known(indices, hidden, num_hidden)


# --- Brute force ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_hidden", "settings"),
    [
        (5, dict(num_iter=3)),
        (11, dict(num_iter=3, guidance=2.5, order="raster")),
        (11, dict(num_iter=4, guidance=2.5, guidance_every=2, order="confidence")),
        (16, dict(num_iter=3, guidance=2.0, order="confidence", choice_temperature=0.5)),
        (11, dict(num_iter=4, order="confidence", choice_temperature=0.0)),
        (6, dict(num_iter=3, order="confidence", choice_temperature=0.0, temperature=0.0)),
    ],
)
def test_edits_equal_those_of_brute_force(params, num_hidden: int, settings: dict):
    settings = SamplingSettings(**{"temperature": 0.8} | settings)
    labels = random_batch(CONFIG, 3, seed=7)["labels"]
    request = Request(labels, NUMBERS, 13, known=_random_known(CONFIG, 3, num_hidden))
    expected = brute_force(CONFIG, params, request, settings)
    np.testing.assert_array_equal(generate(CONFIG, params, request, settings), expected)


def test_confidence_order_over_several_stages_equals_brute_force():
    """One stage has up to 16 visible positions and one up to 32."""
    config = tiny(positions=40)
    params = random_params(config)
    settings = SamplingSettings(num_iter=4, guidance=1.7, guidance_every=2, order="confidence")
    known = _random_known(config, 1, 36)
    request = Request(np.array([1], np.int32), NUMBERS[:1], 3, known=known)
    expected = brute_force(config, params, request, settings)
    np.testing.assert_array_equal(generate(config, params, request, settings), expected)
    # Previews compile one program for each stage.
    compiled = sampler._step[0]._cache_size()
    for _ in range(2):
        *_, (done, steps, last) = generate_steps(config, params, request, settings)
        assert done == steps == 4
        np.testing.assert_array_equal(last, expected)
    assert sampler._step[0]._cache_size() == compiled + 2


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_many_masks_share_a_few_programs(order: str):
    """1 to 16 hidden positions share a program, 17 to 32, and more; some hide fewer than 7."""
    config = tiny(positions=40)
    params = random_params(config)
    settings = SamplingSettings(num_iter=7, guidance=1.6, order=order)
    request = Request(np.array([1], np.int32), NUMBERS[:1], 3)
    compiled = sampler._edit[0]._cache_size()
    for num_hidden in (16, 1, 2, 5, 13, 21, 40, 33):
        request = request._replace(known=_random_known(config, 1, num_hidden, seed=num_hidden))
        drawn = generate(config, params, request, settings)
        if num_hidden in (1, 5, 16, 33):
            expected = brute_force(config, params, request, settings)
            np.testing.assert_array_equal(drawn, expected)
    assert sampler._edit[0]._cache_size() == compiled + 3


# --- Kept positions, previews ---------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_kept_positions_keep_their_indices_and_every_other_is_revealed_once(params, order: str):
    """Previews show hidden positions as `known` has them: here 255, which no model can draw."""
    known = _random_known(CONFIG, 4, 13, seed=3)
    settings = SamplingSettings(num_iter=6, order=order)
    numbers = np.arange(4, dtype=np.int32)
    request = Request(np.zeros(4, np.int32), numbers, known=known)
    states = [np.where(known.hidden[:, :, None], 255, known.values)]
    states += [np.asarray(x) for _, _, x in generate_steps(CONFIG, params, request, settings)]
    counts = [13, *hidden_counts(13, 6)]
    assert len(states) == len(counts)
    revealed = []
    for before, now, left in zip(states[:-1], states[1:], counts[1:], strict=True):
        was_hidden, is_hidden = (before == 255).all(axis=2), (now == 255).all(axis=2)
        assert (is_hidden.sum(axis=1) == left).all()
        np.testing.assert_array_equal(now[~was_hidden], before[~was_hidden])
        revealed.append(was_hidden & ~is_hidden)
        if order == "raster":
            for image in range(4):
                new = np.flatnonzero(revealed[-1][image])
                assert new.max() < min(np.flatnonzero(is_hidden[image]), default=16)
    np.testing.assert_array_equal(np.sum(revealed, axis=0), known.hidden)
    assert (states[-1] < CONFIG.levels).all()
    np.testing.assert_array_equal(generate(CONFIG, params, request, settings), states[-1])
    if order == "confidence":
        queue = np.asarray(random_orders(0, jnp.asarray(numbers), 16))[0]
        first = [int(p) for p in queue if known.hidden[0, p]][counts[1] :]
        assert sorted(first) != np.flatnonzero(revealed[0][0]).tolist()


def test_kept_positions_stay_even_if_the_model_overflows(params):
    """The confidence is then NaN everywhere."""
    known = _random_known(CONFIG, 3, 11)
    settings = SamplingSettings(num_iter=3, guidance=3e38, order="confidence")
    request = Request(np.zeros(3, np.int32), NUMBERS, known=known)
    drawn = np.asarray(generate(CONFIG, params, request, settings))
    np.testing.assert_array_equal(drawn[~known.hidden], known.values[~known.hidden])


def test_editing_everything_is_generating_and_previews_start_from_the_middle_level(params):
    settings = SamplingSettings(num_iter=3, guidance=1.5, temperature=0.9)
    whole = Request(np.arange(3, dtype=np.int32), NUMBERS, 5)
    expected = generate(CONFIG, params, whole, settings)
    everything = whole._replace(known=_random_known(CONFIG, 3, 16))
    np.testing.assert_array_equal(generate(CONFIG, params, everything, settings), expected)
    shown = list(generate_steps(CONFIG, params, whole, settings, every=2))
    np.testing.assert_array_equal(shown[-1][2], expected)
    assert [x[:2] for x in shown] == [(2, 3), (3, 3)]
    # Hidden positions have the middle one of five levels.
    hidden = (np.asarray(shown[0][2]) == 2).all(axis=2)
    assert (hidden.sum(axis=1) >= hidden_counts(16, 3)[1]).all()
    differs = (np.asarray(shown[0][2]) != np.asarray(expected)).any(axis=2)
    assert (hidden | ~differs).all()


def test_choice_temperature_goes_from_certain_to_random(params):
    """The first of 16 steps reveals one position: the most certain one, or (very hot) any."""
    hidden = np.ones((64, 16), bool)
    known = Known(np.full((64, 16, 4), 255, np.uint8), hidden, 16)
    request = Request(np.zeros(64, np.int32), np.arange(64, dtype=np.int32), known=known)

    def first(choice_temperature: float) -> np.ndarray:
        settings = SamplingSettings(
            16, temperature=0.0, order="confidence", choice_temperature=choice_temperature
        )
        _, _, shown = next(generate_steps(CONFIG, params, request, settings))
        return np.bincount(np.argmax(np.asarray(shown)[:, :, 0] < 255, axis=1), minlength=16)

    assert first(0.0).max() == 64
    assert first(1e6).max() < 16


# --- Classes --------------------------------------------------------------------------------------


def test_weights_of_classes_mix_their_embeddings(params):
    settings = SamplingSettings(num_iter=3, guidance=1.5, temperature=0.9)
    request = Request(np.array([2, 0, 1], np.int32), NUMBERS, 5)
    one_hot = request._replace(labels=np.eye(3, dtype=np.float32)[request.labels])
    expected = np.asarray(generate(CONFIG, params, request, settings))
    np.testing.assert_array_equal(generate(CONFIG, params, one_hot, settings), expected)
    # For a model with the mixture in its table, it is a class; so is the null latent for no class.
    weights = np.array([[0.25, 0.75, 0], [0, 0, 0], [0, 0, 1]], np.float32)
    backbone = params["backbone"]
    mixed = 0.25 * backbone["class_embedding"][0] + 0.75 * backbone["class_embedding"][1]
    table = jnp.stack([mixed, backbone["null_latent"][0], backbone["class_embedding"][2]])
    other = params | {"backbone": backbone | {"class_embedding": table}}
    found = generate(CONFIG, params, request._replace(labels=weights), settings)
    classes = request._replace(labels=np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(found, generate(CONFIG, other, classes, settings))
    assert (np.asarray(found) != expected).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels=[[0, 0, 1], [0.5, 0.2, 0]]), r"classes must sum to 1, not to 0\.7"),
        (dict(labels=[[0.5, 0.5]]), "weights of 2 classes, the model has 3"),
        (dict(labels=[0], preview_every=0), "preview_every=0 must be at least 1"),
    ],
)
def test_weights_are_checked(params, arguments, message):
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        generate_in_batches(CONFIG, params, settings=SamplingSettings(2), mesh=mesh, **arguments)


# --- Batches and devices --------------------------------------------------------------------------


def test_batch_size_and_devices_change_no_edit(params):
    """The images have 5, 9 or no hidden positions in mixed order; one has a mixture of classes.

    In contrast to random order, confidence order moves positions between slots.
    """
    settings = SamplingSettings(num_iter=3, guidance=1.8, temperature=0.9, order="confidence")
    few, many = _random_known(CONFIG, 4, 5), _random_known(CONFIG, 3, 9, seed=1)
    none = _random_known(CONFIG, 1, 0)
    mixed = np.array([0, 4, 7, 1, 5, 2, 6, 3])
    known = np.concatenate([few.values, many.values, none.values])[mixed]
    hidden = np.concatenate([few.hidden, many.hidden, none.hidden])[mixed]
    labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 0, 1]]
    labels[2] = [0.5, 0.25, 0.25]
    boxed = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))

    def run(sizes: tuple[int, ...], batch_size: int) -> np.ndarray:
        mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        placed = jax.device_put(params, meshes.logical_shardings(boxed, mesh))
        batch = dict(labels=labels, known=known, hidden=hidden)
        return generate_in_batches(
            CONFIG, placed, settings=settings, mesh=mesh, seed=21, batch_size=batch_size, **batch
        )

    expected = run((1, 1, 1), 8)
    np.testing.assert_array_equal(expected[~hidden], known[~hidden])
    assert (expected < CONFIG.levels).all()
    np.testing.assert_array_equal(run((1, 1, 1), 3), expected)
    np.testing.assert_array_equal(run((2, 2, 2), 8), expected)


# --- Images ---------------------------------------------------------------------------------------


SETTINGS = dict(num_iter=2, temperature=0.8)
MASK = np.zeros((8, 8), bool)
MASK[3, 2:5] = True  # Row 1 of positions, columns 1 and 2.


def test_a_position_is_redrawn_if_any_of_its_pixels_is_masked(pipeline, pixels):
    changed = np.zeros((4, 4), bool)
    changed[1, 1:3] = True
    before = pipeline.encode(pixels)
    settings = SETTINGS | dict(encode_hidden=True)
    edited = pipeline.edit(pixels, MASK, "dog", seed=1, **settings)
    hidden = np.tile(changed.ravel(), (3, 1))
    indices = pipeline.generate_indices([1] * 3, known=before, hidden=hidden, seed=1, **SETTINGS)
    np.testing.assert_array_equal(edited, pipeline.decode(indices))
    np.testing.assert_array_equal(indices[~hidden], before[~hidden])
    assert (indices[hidden] != before[hidden]).any()
    # One image alone; then a mask and a class for each image.
    alone = pipeline.edit(pixels[0], MASK, {"dog": 1.0}, seed=1, **settings)
    np.testing.assert_array_equal(alone, edited[0])
    shown: list = []
    each = pipeline.edit(
        pixels,
        np.stack([MASK] * 3),
        [1, "dog", 1],
        seed=1,
        batch_size=2,
        preview=lambda *x: shown.append(x),
        **settings,
    )
    np.testing.assert_array_equal(each, edited)
    assert [(done, steps, len(x)) for done, steps, x in shown] == [
        (1, 2, 2), (2, 2, 2), (1, 2, 1), (2, 2, 1),
    ]  # fmt: skip
    np.testing.assert_array_equal(shown[1][2], edited[:2])


@pytest.fixture
def calls(pipeline, monkeypatch):
    """The keyword arguments with which an edit calls `generate_indices`."""
    calls: list[dict] = []
    draw = pipeline.generate_indices
    monkeypatch.setattr(
        pipeline, "generate_indices", lambda *x, **y: calls.append(y) or draw(*x, **y)
    )
    return calls


def test_pixels_of_hidden_positions_have_no_effect(pipeline, pixels, calls):
    """Each image has its own mask, which covers parts of two positions."""
    mask = np.zeros((3, 8, 8), bool)
    mask[0, 3, 2:5] = mask[1, 5:7, 7] = mask[2, 1:3, 0] = True
    cells = mask.reshape(3, 4, 2, 4, 2).any(axis=(2, 4))
    covered = cells.repeat(2, axis=1).repeat(2, axis=2)[..., None]
    visible = ~cells.reshape(3, 16)

    def run(images, mask=mask, **keywords):
        edited = pipeline.edit(images, mask, 1, **keywords, **SETTINGS)
        return calls[-1]["known"], edited

    known, edited = run(pixels)
    assert len(np.unique(pipeline.encode(pixels)[visible] != known[visible])) == 2
    for other in (255 - pixels, pixels[::-1], pixels & 0):
        again, same = run(np.where(covered, other, pixels))
        np.testing.assert_array_equal(again[visible], known[visible])
        np.testing.assert_array_equal(same, edited)
    hidden = np.where(mask[..., None], 255 - pixels, pixels)
    np.testing.assert_array_equal(run(hidden, blend=2)[1], run(pixels, blend=2)[1])
    # Touch-ups encode them, and so do variations by default.
    seen, _ = run(hidden, encode_hidden=True)
    np.testing.assert_array_equal(seen, pipeline.encode(hidden))
    varied, _ = run(pixels, keep=0.5)
    np.testing.assert_array_equal(varied, pipeline.encode(pixels))
    drawn = hidden_positions(mask, (3, 8, 8), 2, keep=0.5).reshape(3, 4, 4)
    filled = fill_hidden(pixels, drawn.repeat(2, axis=1).repeat(2, axis=2), 2)
    varied, _ = run(pixels, keep=0.5, encode_hidden=False)
    np.testing.assert_array_equal(varied, pipeline.encode(filled))


def test_variations_keep_a_share(pipeline, pixels, calls):
    left_half = np.tile(np.arange(8) < 4, (8, 1))
    for images, mask in (pixels, None), (pixels[:1], None), (pixels, left_half):
        pipeline.edit(images, mask, None, keep=0.25, **SETTINGS)
    every, first, left = (call["hidden"] for call in calls)
    assert (every.sum(axis=1) == 12).all()
    assert len(np.unique(every, axis=0)) == 3
    np.testing.assert_array_equal(first, every[:1])
    assert not left[:, np.arange(16) % 4 >= 2].any()
    assert (left.sum(axis=1) == 6).all()


def test_blending_puts_the_original_pixels_back(pipeline, pixels):
    plain = pipeline.edit(pixels, MASK, 0, **SETTINGS)
    hard = pipeline.edit(pixels, MASK, 0, blend=0, **SETTINGS)
    np.testing.assert_array_equal(hard, np.where(MASK[..., None], plain, pixels))
    # With one masked row, the ramp falls by a third in each row on both sides.
    row = np.zeros((1, 8, 8), bool)
    row[0, 3] = True
    old, new = np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 240, np.uint8)
    ramp = blend_images(old, new, row, 2)[0, :, 5, 0]
    assert ramp.tolist() == [0, 80, 160, 240, 160, 80, 0, 0]


def test_previews_of_a_model_on_fewer_devices_than_the_autoencoder(pipeline):
    """The batch does not divide over the devices of the autoencoder."""
    codec = pipeline.codec
    everywhere = meshes.make_mesh(devices=jax.devices()[:2])
    codec = Codec(codec.config, codec.params, codec.quantizer, everywhere)
    other = Pipeline(pipeline.description, pipeline.params, codec, pipeline.mesh)
    shown: list[np.ndarray] = []
    pixels = other.generate([0, 1, 2], num_iter=2, preview=lambda *x: shown.append(x[2]))
    np.testing.assert_array_equal(shown[-1], pixels)
    np.testing.assert_array_equal(pixels, pipeline.generate([0, 1, 2], num_iter=2))


def test_mistakes_in_an_edit_are_reported(pipeline, pixels):
    def refused(match, pixels=pixels, mask=MASK, class_id=0, **settings):
        with pytest.raises(UserError, match=match):
            pipeline.edit(pixels, mask, class_id, **settings)

    refused("mask of image 0 is empty: there is nothing to redraw", mask=MASK & False)
    refused("mask of image 1 is empty", mask=np.stack([MASK, MASK & False, MASK]))
    refused("covers all positions of image 0: nothing would be kept", mask=MASK | True)
    refused("the mask must be bool, True where to redraw, not uint8", mask=MASK.astype(np.uint8))
    refused(r"mask's shape \(4, 4\) is neither that of an image, \(8, 8\)", mask=MASK[:4, :4])
    refused("nothing is to be redrawn", mask=None)
    refused(r"keep=1\.0 must be a share above 0 and below 1", mask=None, keep=1.0)
    refused("blend=-1 must be 0 or more", blend=-1)
    refused("there are 2 classes for 3 images", class_id=[0, 1])
    refused("there is no class named 'cow' among 3", class_id={"cow": 1})
    refused(r"must sum to 1, not to 1\.1", class_id={"cat": 0.5, "dog": 0.6})
    refused(r"must sum to 1, not to 0", class_id={"cat": 0})
    refused("sampling.batch_size=-1 must be at least 1", batch_size=-1)
    refused(r"images are 4x4, the model draws 8x8 pixels", pixels=pixels[:, :4, :4])
    refused("sampling.order='spiral' is not one of random, raster", order="spiral")
    refused(r"sampling\.choice_temperature=-1\.0 must be 0 or more", choice_temperature=-1.0)
