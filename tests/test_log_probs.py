"""`Pipeline.log_probs` against the model's logits; probabilities sum to one."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from tiny_model import in_order, jitted, random_batch, random_params, tiny, tiny_pipeline

from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError

# Its sampler adds something that training does not add.
CONFIG = tiny(positions=16, first_token_quirk=True)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(CONFIG, random_params(CONFIG, spread=0.2))


@pytest.fixture(scope="module")
def batch():
    """Images with 0 to 16 hidden positions."""
    rng = np.random.default_rng(3)
    hidden = np.stack([rng.permutation(16) < count for count in (5, 16, 1, 9, 0)])
    return random_batch(CONFIG, 5, seed=2)["indices"], hidden


def test_they_are_those_of_the_sampled_distribution(pipeline, batch):
    """The training logits of a model whose first channel embedding includes what sampling adds."""
    indices, hidden = batch
    head = pipeline.params["head"]
    added = head["channel_embed"].at[0].add(head["timestep_embed"][0])
    params = pipeline.params | {"head": head | {"channel_embed": added}}
    found = pipeline.log_probs(indices, ["dog", 2, None, 0, 1], hidden=hidden, batch_size=2)
    np.testing.assert_array_equal(np.isnan(found), np.repeat(~hidden[..., None], 4, axis=2))
    for image, (label, mask) in enumerate(zip([1, 2, 0, 0, 1], hidden, strict=True)):
        order = np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)])[None]
        logits = jitted(CONFIG)(
            params,
            jnp.asarray(indices[image][None]),
            jnp.array([label]),
            jnp.asarray(order),
            jnp.int32(mask.sum()),
            jnp.array([image == 2]),
        )
        expected = special.log_softmax(np.asarray(logits, np.float64)[0], axis=-1)
        channels = list(CONFIG.channel_order)
        slots = in_order(indices[image][None], order)[0][: mask.sum(), channels]
        expected = np.take_along_axis(expected[: mask.sum()], slots[..., None], axis=2)[..., 0]
        np.testing.assert_allclose(found[image][mask][:, channels], expected, atol=1e-5)


def test_probabilities_of_a_position_sum_to_one(pipeline, batch):
    indices, hidden = batch
    everything = np.array(list(itertools.product(range(5), repeat=4)), np.uint8)
    images = np.repeat(indices[:1], len(everything), axis=0)
    place = np.flatnonzero(hidden[0])[2]
    images[:, place] = everything
    masks = np.repeat(hidden[:1], len(everything), axis=0)
    found = pipeline.log_probs(images, [1] * len(images), hidden=masks, batch_size=625)
    np.testing.assert_allclose(np.exp(found[:, place].sum(axis=1)).sum(), 1, atol=1e-4)


def test_devices_change_nothing(pipeline, batch):
    indices, hidden = batch
    other = tiny_pipeline(CONFIG, pipeline.params, meshes.make_mesh(2, 2, 2))
    expected = pipeline.log_probs(indices, [{0: 0.5, 2: 0.5}] * 5, hidden=hidden)
    found = other.log_probs(indices, [{0: 0.5, 2: 0.5}] * 5, hidden=hidden)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("added", "labels", "batch_size", "message"),
    [
        (0, [0], 5, r"indices must be integers of shape \[1, 16, 4\], not"),
        (5, [0] * 5, 5, "indices must be from 0 to 4"),
        (0, [0] * 5, 0, "batch_size=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(pipeline, batch, added, labels, batch_size, message):
    with pytest.raises(UserError, match=message):
        pipeline.log_probs(batch[0] + added, labels, batch_size=batch_size)
