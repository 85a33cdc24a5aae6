"""The Python interface: arguments that are refused in one line, and equivalent arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokenbridge_jax import Pipeline
from tokenbridge_jax.runtime import checks
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.batches import generate_in_batches
from tokenbridge_jax.sampling.schedule import SamplingSettings

NAN = float("nan")
IMAGES = np.zeros((2, 8, 8, 1), np.uint8)
INDICES = np.zeros((2, 16, 4), np.uint8)
MASK = np.arange(8) < np.full((8, 1), 4)
RAGGED = [IMAGES[0], IMAGES[0, :4]]


def _sample(pipeline, labels=(0, 1), **arguments):
    settings = SamplingSettings(2)
    return generate_in_batches(
        pipeline.config, pipeline.params, labels, settings, pipeline.mesh, **arguments
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # Images.
        (lambda p: p.encode(IMAGES / 255), r"uint8 .* not float64 \[2, 8, 8, 1\]; scale them to 0"),
        (lambda p: p.encode(IMAGES.astype(np.float32)), "images must be uint8 .* not float32"),
        (lambda p: p.encode(IMAGES.astype(np.int64)), "images must be uint8 .* not int64"),
        (lambda p: p.encode(IMAGES.tolist()), "images must be uint8 .* not int64"),
        (lambda p: p.encode(IMAGES > 0), "images must be uint8 .* not bool"),
        (lambda p: p.encode(IMAGES[0]), r"not uint8 \[8, 8, 1\]; images\[None\] is a batch of one"),
        (lambda p: p.encode(IMAGES[..., 0, 0]), r"images must be uint8 .* not uint8 \[2, 8\]"),
        (lambda p: p.encode(IMAGES[:0]), r"images of shape \[0, 8, 8, 1\] are empty"),
        (lambda p: p.encode([]), "images must be uint8"),
        (lambda p: p.encode(None), "images must be uint8 .* not object"),
        (lambda p: p.encode("a.png"), "images must be uint8"),
        (lambda p: p.encode(RAGGED), "images must be one array, or a list of equal shapes"),
        (lambda p: p.encode(IMAGES.repeat(3, axis=3)), "images have 3 channels, the autoencoder"),
        (lambda p: p.encode(IMAGES[:, :4]), r"are 4x8, the model draws 8x8 .*\.prepare cuts"),
        (lambda p: p.encode(IMAGES.repeat(2, axis=1)), "images are 16x8, the model draws 8x8"),
        (lambda p: p.encode(IMAGES[:, :7]), "7x8 is not divisible"),
        (lambda p: p.codec.encode(IMAGES / 255), "images must be uint8"),
        (lambda p: p.codec.encode(IMAGES[0]), "images must be uint8"),
        (lambda p: p.codec.encode(IMAGES, [1.5, 2]), "noise_ids must be integers .* not float64"),
        (lambda p: p.codec.encode(IMAGES, [1]), r"noise_ids must be integers of shape \[2\]"),
        (lambda p: p.codec.encode(IMAGES, [1, 2], NAN), "seed=nan must be a whole number"),
        (lambda p: p.edit(IMAGES / 255, MASK, 0), r"or \[H, W, channels\], not float64"),
        (lambda p: p.edit(RAGGED, MASK, 0), "images must be one array"),
        (lambda p: p.edit(IMAGES[0, 0], MASK, 0), "images must be uint8"),
        (lambda p: p.outpaint(IMAGES / 255, 0, left=2), "images must be uint8"),
        (lambda p: p.outpaint(RAGGED, 0, left=2), "images must be one array"),
        # Indices and latents.
        (lambda p: p.decode(INDICES + 5), "indices must be from 0 to 4, not from 5 to 5"),
        (lambda p: p.decode(np.int8(-1) - INDICES), "indices must be from 0 to 4"),
        (lambda p: p.decode(np.full(INDICES.shape, 256)), "indices must be from 0 to 4"),
        (lambda p: p.decode(INDICES / 1), r"integers of shape \[B, 16, 4\], not float64"),
        (lambda p: p.decode(INDICES > 0), "indices must be integers .* not bool"),
        (lambda p: p.decode(INDICES[0]), r"not uint8 \[16, 4\]"),
        (lambda p: p.decode(INDICES[:, :9]), r"not uint8 \[2, 9, 4\]"),
        (lambda p: p.decode(INDICES[:0]), r"indices of shape \[0, 16, 4\] are empty"),
        (lambda p: p.decode([INDICES[0], INDICES[1, :3]]), "indices must be one array"),
        (lambda p: p.codec.decode(INDICES + 5), "indices must be from 0 to 4"),
        (lambda p: p.codec.decode(jnp.asarray(INDICES) + 5), "indices must be from 0 to 4"),
        (lambda p: p.codec.decode_maps(INDICES - 1), "indices must be .* of shape .B, h, w, 4."),
        (lambda p: p.codec.decode_maps(INDICES[:, None] - 1), "indices must be from 0 to 4"),
        (lambda p: p.codec.decode_latents(INDICES[:, None]), "latents must be floats .* not uint8"),
        (lambda p: p.log_probs(INDICES / 1, [0, 1]), "indices must be integers"),
        (lambda p: p.log_probs(INDICES + 5, [0, 1]), "indices must be from 0 to 4"),
        (lambda p: p.log_probs(INDICES, [0, 1], hidden=INDICES[..., 0]), "hidden must be bool"),
        (lambda p: p.log_probs(INDICES, [0, 1], batch_size=1.5), "batch_size=1.5 must be a whole"),
        (lambda p: p.generate_indices([0, 1], known=INDICES[:1]), r"known must be .* \[2, 16, 4\]"),
        (lambda p: p.generate_indices([0, 1], known=INDICES / 1), "known must be integers"),
        (
            lambda p: p.generate_indices([0, 1], known=INDICES, hidden=INDICES[..., 0]),
            r"hidden must be bool of shape \[2, 16\], not uint8",
        ),
        (
            lambda p: p.generate_indices([0, 1], known=INDICES + 5, hidden=INDICES[..., 0] > 0),
            "indices must be from 0 to 4",
        ),
        (lambda p: p.generate_indices([0], hidden=np.ones((1, 16), bool)), "give known too"),
        # Classes.
        (lambda p: p.generate(3), r"3 is no list of classes; write \[3\] for one"),
        (lambda p: p.generate(np.array(3)), "is no list of classes"),
        (lambda p: p.generate(jnp.int32(3)), "is no list of classes"),
        (lambda p: p.generate({0: 1.0}), "is no list of classes"),
        (lambda p: p.generate("cat"), "'cat' is no list of classes"),
        (lambda p: p.generate(jnp.zeros(0, jnp.int32)), "no classes were asked for"),
        (lambda p: p.generate(np.array([0, 3])), "class 3 does not exist"),
        (lambda p: p.generate([-1]), "class -1 does not exist"),
        (lambda p: p.edit(IMAGES, MASK, jnp.arange(3)), "there are 3 classes for 2 images"),
        (lambda p: p.edit(IMAGES, MASK, []), "there are 0 classes for 2 images"),
        (lambda p: _sample(p, []), "labels must be whole numbers"),
        (lambda p: _sample(p, [0.5, 1.5]), "labels must be whole numbers"),
        (lambda p: _sample(p, 1), "labels must be whole numbers"),
        (lambda p: _sample(p, [0, 3]), "labels must be from 0 to 2"),
        (lambda p: _sample(p, [[NAN, 1, 0]]), "must sum to 1, not to nan"),
        (lambda p: _sample(p, [[1, 0, 0], [1]]), "labels must be one array"),
        # Numbers.
        (lambda p: p.generate([0], seed=NAN), "seed=nan must be a whole number"),
        (lambda p: p.generate([0], seed=1.0), "seed=1.0 must be a whole number"),
        (lambda p: p.generate([0], seed=None), "seed=None must be a whole number"),
        (lambda p: p.generate([0], seed=[1, 2]), "must be a whole number"),
        (lambda p: p.generate([0], seed=2**32), r"seed=4294967296 must be from 0 to 2\*\*32 - 1"),
        (lambda p: p.generate([0], seed=10**30), "must be from 0"),
        (lambda p: p.generate([0], seed=True), "seed=True must be a whole number"),
        (lambda p: p.generate([0], batch_size=-3), "sampling.batch_size=-3 must be at least 1"),
        (lambda p: p.generate([0], batch_size=2.0), "batch_size=2.0 must be a whole number"),
        (lambda p: p.generate([0], preview=True), "preview=True must be a function"),
        (lambda p: p.generate([0], preview_every=0.5), "preview_every=0.5 must be a whole"),
        (lambda p: p.stream([0, 1], numbers=[2]), "numbers must be whole numbers from 0 to 1"),
        (lambda p: p.stream([0, 1], numbers=[-1]), "numbers must be whole numbers from 0 to 1"),
        (lambda p: p.stream([0, 1], numbers=[0.5]), "numbers must be whole numbers from 0 to 1"),
        (lambda p: p.stream([0, 1], numbers=1), "numbers must be whole numbers from 0 to 1"),
        (lambda p: p.edit(IMAGES, MASK, 0, seed=NAN), "seed=nan must be a whole number"),
        (lambda p: p.edit(IMAGES, None, 0, keep=NAN), "keep=nan must be a share above 0"),
        (lambda p: p.edit(IMAGES, None, 0, keep="0.5"), "keep='0.5' must be a number"),
        (lambda p: p.edit(IMAGES, MASK, 0, blend=1.5), "blend=1.5 must be a whole number"),
        (lambda p: p.edit(IMAGES, MASK, 0, blend=NAN), "blend=nan must be a whole number"),
        (lambda p: p.edit(IMAGES, MASK, 0, preview=1), "preview=1 must be a function"),
        (lambda p: p.edit(IMAGES, [*MASK.tolist()[:7], [True]], 0), "mask must be one array"),
        (lambda p: p.edit(IMAGES, "m.png", 0), "the mask must be bool"),
        (lambda p: p.edit(IMAGES, MASK / 1, 0), "the mask must be bool"),
        (lambda p: p.outpaint(IMAGES, 0, left=2.0), "left=2.0 must be a whole number"),
        (lambda p: p.outpaint(IMAGES, 0, left=2, overlap=NAN), "overlap=nan must be a share"),
        (lambda p: p.outpaint(IMAGES, 0, left=2, overlap=None), "overlap=None must be a number"),
        (lambda p: p.outpaint(IMAGES, 0, left=2, seed=0.5), "seed=0.5 must be a whole number"),
        # Folders.
        (lambda p: Pipeline.load(None), "workdir=None must be a path"),
        (lambda p: Pipeline.load(3), "workdir=3 must be a path"),
        (lambda p: Pipeline.load("x", step="3"), "step='3' must be a whole number"),
        (lambda p: Pipeline.load("x", step=-1), "step=-1 must be at least 0"),
        (lambda p: Pipeline.load("x", mesh=2), "mesh=2 must be a mesh"),
        (lambda p: p.save_pretrained(None), "directory=None must be a path"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(pipeline, call, message):
    with pytest.raises(UserError, match=message) as raised:
        call(pipeline)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_iter=2.5), "sampling.num_iter=2.5 must be a whole number"),
        (dict(num_iter=NAN), "sampling.num_iter=nan must be a whole number"),
        (dict(temperature="1"), "sampling.temperature='1' must be a number"),
        (dict(guidance=None), "sampling.guidance=None must be a number"),
        (dict(guidance=[1, 2]), r"sampling.guidance=\[1, 2\] must be a number"),
    ],
)
def test_settings_are_numbers(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**settings)


def test_arrays_of_any_library_and_lists_are_equivalent(pipeline, pixels):
    indices = pipeline.encode(pixels)
    for given in (list(pixels), jnp.asarray(pixels), [jnp.asarray(x) for x in pixels]):
        np.testing.assert_array_equal(pipeline.encode(given), indices)
    decoded = pipeline.decode(indices)
    for given in (
        indices.tolist(), list(indices), indices.astype(np.int64), indices.astype(">u2"),
        jnp.asarray(indices),
    ):  # fmt: skip
        np.testing.assert_array_equal(pipeline.decode(given), decoded)


def test_classes_and_numbers_of_any_library_are_equivalent(pipeline):
    for given in (
        [0, 2], (0, 2), range(0, 3, 2), np.array([0, 2]), jnp.array([0, 2]), list(np.array([0, 2])),
        list(jnp.array([0, 2])), np.array(["cat", "7"]), np.array([0, "7"], object),
    ):  # fmt: skip
        np.testing.assert_array_equal(pipeline.labels(given), [0, 2])
    for given in (7, np.int8(7), np.array(7), jnp.uint32(7)):
        assert checks.seed(given) == 7
    for given in (0.5, np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5)):
        assert checks.number("x", given) == 0.5
