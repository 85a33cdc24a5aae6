"""The model against mathematics: causality, leaks, padding, chunks, precision."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from tiny_model import (
    TINY,
    ZERO_GRADIENT,
    equations,
    in_order,
    jitted,
    leaf_names,
    loss_and_gradients,
    random_batch,
    random_params,
    relative_error,
    tiny,
    tree_error,
    without_key_bias,
)

from tokenbridge_jax.errors import UserError
from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig, abstract_params
from tokenbridge_jax.quantizer import Quantizer

BATCH = 3
HIDDEN = 6


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def batch():
    return random_batch(TINY, BATCH)


# --- Causality in the channel order ---------------------------------------------------------------


def test_logits_of_a_channel_depend_on_exactly_the_channels_before_it(params):
    """By changing indices: place c sees channel k iff k's place lies before c."""
    config = tiny(channel_order=(2, 0, 3, 1))
    rng = np.random.default_rng(1)
    feature = jnp.asarray(rng.normal(size=(7, config.decoder_width)), jnp.float32)
    indices = rng.integers(config.levels, size=(7, config.channels)).astype(np.int32)
    logits = jax.jit(
        lambda indices: TokenBridge(config).apply(
            {"params": params}, method=lambda model: model.head.logits(feature, indices)
        )
    )
    before = np.asarray(logits(indices))
    assert before.shape == (7, config.channels, config.levels)
    assert before.dtype == np.float32
    for channel in range(config.channels):
        changed = indices.copy()
        changed[:, channel] = (changed[:, channel] + 1) % config.levels
        differs = (np.asarray(logits(changed)) != before).any(axis=-1)
        place = config.channel_order.index(channel)
        later = np.arange(config.channels) > place
        np.testing.assert_array_equal(differs, np.broadcast_to(later, differs.shape))


def test_gradient_of_a_channel_reaches_exactly_the_tables_before_it(params):
    """By gradient: d logits[place c] / d table of place p is zero iff p >= c.

    Within a table only the row of that channel's index counts, which pins table p to channel
    `channel_order[p]`.
    """
    rng = np.random.default_rng(2)
    feature = jnp.asarray(rng.normal(size=(1, TINY.decoder_width)), jnp.float32)
    indices = jnp.array([[0, 1, 2, 3]])  # Channel k holds level k.
    direction = rng.normal(size=TINY.levels).astype(np.float32)

    def projected(tables):
        head = params["head"] | {"token_embeddings": tables}
        return TokenBridge(TINY).apply(
            {"params": params | {"head": head}},
            method=lambda model: model.head.logits(feature, indices)[0] @ direction,
        )

    gradient = np.asarray(jax.jit(jax.jacrev(projected))(params["head"]["token_embeddings"]))
    reached = (gradient != 0).all(axis=-1)  # [place c, table p, level]
    np.testing.assert_array_equal(reached, (gradient != 0).any(axis=-1))
    for place in range(TINY.channels):
        for earlier in range(TINY.channels - 1):
            expected = np.zeros(TINY.levels, bool)
            expected[TINY.channel_order[earlier]] = earlier < place
            np.testing.assert_array_equal(reached[place, earlier], expected)


def test_channel_order_must_be_a_permutation():
    for order in [(0, 1, 1, 3), (0,), (1, 2, 3, 4), ()]:
        with pytest.raises(UserError, match=r"each of 0\.\.C-1 once"):
            tiny(channel_order=order)


# --- Hidden positions -----------------------------------------------------------------------------


@pytest.mark.parametrize("visible_slots", [3, 5, TINY.positions])
def test_hidden_positions_never_leak_into_features(params, batch, visible_slots: int):
    """Whatever the padding: changing what is hidden changes no bit; visible ones do count."""
    num_hidden = np.array([5, 8, 6], np.int32)  # One an image; nothing of image 1 is visible.
    features = jitted(TINY, "features")
    rest = batch["labels"], batch["order"], num_hidden, np.zeros(BATCH, bool)
    slots = in_order(batch["indices"], batch["order"])[:, TINY.positions - visible_slots :]
    before = features(params, slots, *rest)
    assert np.isfinite(before).all()

    slot = np.arange(TINY.positions - visible_slots, TINY.positions)
    hidden = (slot < num_hidden[:, None])[..., None]
    assert hidden.any()
    other = (slots + 1) % TINY.levels
    np.testing.assert_array_equal(features(params, np.where(hidden, other, slots), *rest), before)

    # Padding changes nothing but rounding.
    exact = features(params, in_order(batch["indices"], batch["order"])[:, 3 - 8 :], *rest)
    assert relative_error(before, exact) < 1e-6

    # Each visible position alone reaches every slot of its image and no other image.
    for image, j in zip(*np.nonzero(~hidden[..., 0]), strict=True):
        changed = slots.copy()
        changed[image, j] = other[image, j]
        differs = np.asarray(features(params, changed, *rest) != before).any(axis=-1)
        assert differs[image].all()
        assert not np.delete(differs, image, axis=0).any()


def test_gradient_with_respect_to_latents_is_zero_exactly_where_hidden(params, batch):
    num_hidden = np.array([5, 8, 6], np.int32)
    values = np.random.default_rng(3).normal(size=(BATCH, TINY.positions, TINY.channels))
    labels, order = jnp.asarray(batch["labels"]), jnp.asarray(batch["order"])

    def projected(values):
        def run(model):
            latent = model.backbone.class_latent(labels, jnp.zeros(BATCH, bool))
            return model.backbone(values, latent, order, jnp.asarray(num_hidden))

        feature = TokenBridge(TINY).apply({"params": params}, method=run)
        weights = np.random.default_rng(4).normal(size=feature.shape).astype(np.float32)
        return jnp.sum(feature * weights)

    gradient = np.asarray(jax.jit(jax.grad(projected))(values.astype(np.float32)))
    hidden = np.arange(TINY.positions) < num_hidden[:, None]
    assert (gradient[hidden] == 0).all()
    assert (gradient[~hidden] != 0).all()


def test_logits_of_a_hidden_position_see_only_its_own_earlier_channels(params, batch):
    """The whole model: teacher forcing leaks neither between hidden positions nor backwards."""
    logits = jitted(TINY)
    rest = batch["labels"], batch["order"], np.int32(HIDDEN), np.zeros(BATCH, bool)
    before = np.asarray(logits(params, batch["indices"], *rest))
    slot, channel = 2, TINY.channel_order[1]
    indices = batch["indices"].copy()
    position = batch["order"][:, slot]
    images = np.arange(BATCH)
    indices[images, position, channel] = (indices[images, position, channel] + 1) % TINY.levels
    differs = (np.asarray(logits(params, indices, *rest)) != before).any(axis=-1)
    expected = np.zeros((BATCH, TINY.positions, TINY.channels), bool)
    expected[:, slot, 2:] = True
    np.testing.assert_array_equal(differs, expected)


def test_dropping_the_class_puts_the_null_latent_in_its_place(params, batch):
    features = jitted(TINY, "features")
    slots = in_order(batch["indices"], batch["order"])
    rest = batch["order"], np.int32(HIDDEN)
    drop = np.array([True, False, True])
    mixed = features(params, slots, batch["labels"], *rest, drop)
    # A model whose class embeddings all are the null latent.
    backbone = params["backbone"]
    null = jnp.tile(backbone["null_latent"], (TINY.classes, 1))
    no_classes = params | {"backbone": backbone | {"class_embedding": null}}
    dropped = features(no_classes, slots, batch["labels"], *rest, np.zeros(BATCH, bool))
    kept = features(params, slots, batch["labels"], *rest, np.zeros(BATCH, bool))
    np.testing.assert_array_equal(mixed, np.where(drop[:, None, None], dropped, kept))
    assert not np.isclose(dropped, kept).all(axis=(1, 2)).any()
    other_class = features(
        params, slots, (batch["labels"] + 1) % TINY.classes, *rest, np.zeros(BATCH, bool)
    )
    assert not np.isclose(other_class, kept).all(axis=(1, 2)).any()


# --- The loss -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brute_force(params, batch):
    """Loss and its mean for every channel, from all logits, in float64."""
    arguments = (batch["indices"], batch["labels"], batch["order"], np.int32(HIDDEN))
    logits = jitted(TINY)(params, *arguments, np.zeros(BATCH, bool))
    log_probability = special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    nll = np.zeros((BATCH, HIDDEN, TINY.channels))
    for image in range(BATCH):
        for slot in range(HIDDEN):
            position = batch["order"][image, slot]
            for place, channel in enumerate(TINY.channel_order):
                index = batch["indices"][image, position, channel]
                nll[image, slot, channel] = -log_probability[image, slot, place, index]
    return nll.mean(), nll.mean(axis=(0, 1))


@pytest.fixture(scope="module")
def exact(params, batch):
    """Loss and gradients with exact slots, all of them through the head at once."""
    return loss_and_gradients(TINY, HIDDEN, TINY.positions - HIDDEN)(
        params, batch, np.int32(HIDDEN), None
    )


def test_loss_is_the_mean_over_hidden_positions_and_channels(exact, brute_force):
    (loss, per_channel), gradients = exact
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, brute_force[0], rtol=1e-6)
    np.testing.assert_allclose(per_channel, brute_force[1], rtol=1e-6)
    # Every parameter learns, but the null latent, which no image used.
    zero = {name for name, leaf in leaf_names(gradients).items() if not leaf.any()}
    assert zero == {"backbone/null_latent"}
    # So does each shift, scale and gate of AdaLN.
    for name, chunks in (("blocks/modulation", 6), ("final_modulation", 2)):
        kernel = np.moveaxis(leaf_names(gradients)[f"head/{name}/kernel"], -2, 0)
        assert len(kernel) == chunks
        assert kernel.any(axis=tuple(range(1, kernel.ndim))).all()


@pytest.mark.parametrize(
    ("head_chunk", "hidden_slots", "visible_slots"),
    [(0, 8, 8), (1, 7, 3), (3, 8, 2), (5, 6, 8), (16, 8, 4)],
)
def test_neither_padding_nor_chunks_change_loss_or_gradients(
    params, batch, exact, brute_force, head_chunk: int, hidden_slots: int, visible_slots: int
):
    function = loss_and_gradients(tiny(head_chunk=head_chunk), hidden_slots, visible_slots)
    (loss, per_channel), gradients = function(params, batch, np.int32(HIDDEN), None)
    np.testing.assert_allclose(loss, brute_force[0], rtol=1e-6)
    np.testing.assert_allclose(per_channel, brute_force[1], rtol=1e-6)
    # Other slots and chunks add the same float32 terms up in another order.
    assert tree_error(gradients, exact[1]) < 5e-5


def test_head_chunk_bounds_what_exists_at_once():
    """No value of grad(loss) holds all hidden positions x channels x levels (or x head width)."""
    images, chunk = 4, 2
    config = tiny(
        quantizer=Quantizer.gaussian(levels=64), positions=32, head_width=32, decoder_width=8,
        encoder_heads=2, decoder_heads=2,
    )  # fmt: skip
    at_once = images * config.positions * config.channels * config.head_width
    everything = _largest_value(config, images)
    assert everything >= images * config.positions * config.channels * config.levels > at_once
    assert _largest_value(dataclasses.replace(config, head_chunk=chunk), images) < at_once


def _largest_value(config: TokenBridgeConfig, images: int) -> int:
    """Elements of the largest value in the program of the loss's gradient, loops included."""
    shape = (images, config.positions, config.channels)
    slots = dict(hidden_slots=config.positions, visible_slots=config.positions)
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda params: TokenBridge(config).apply(
                {"params": params},
                jnp.zeros(shape, jnp.int32),
                jnp.zeros(images, jnp.int32),
                jnp.tile(jnp.arange(config.positions), (images, 1)),
                jnp.int32(config.positions),
                jnp.zeros(images, bool),
                method=TokenBridge.loss,
                **slots,
            )[0]
        )
    )(abstract_params(config))
    values = (v.aval for _, eqn in equations(jaxpr.jaxpr) for v in eqn.outvars)
    return max(math.prod(aval.shape) for aval in values if hasattr(aval, "shape"))


# --- Precision ------------------------------------------------------------------------------------


def test_bfloat16_agrees_with_float32_to_its_accuracy(batch):
    """bfloat16 keeps 8 bits: rounding to it errs by up to u = 2^-9 of a value.

    A feature or gradient has gone through some 50 roundings in series (forward and back, weights
    included). Independent errors grow to sqrt(50) u = 0.014, coherent ones to 50 u = 0.1. All of
    the gradient, and all of the features, must come near the first, any one leaf within the second.
    The loss depends on the rounding of many positions at once: 0.002. Weights of 0.1 keep the model
    itself from magnifying errors: rounding nothing but them changes the gradient by 0.008.
    """
    params = random_params(TINY, spread=0.1)
    config = tiny(dtype="bfloat16")
    slots = HIDDEN, TINY.positions - HIDDEN
    arguments = params, batch, np.int32(HIDDEN), None
    (exact_loss, _), exact = loss_and_gradients(TINY, *slots)(*arguments)
    (loss, _), gradients = loss_and_gradients(config, *slots)(*arguments)
    assert loss.dtype == jnp.float32
    assert 0 < abs(float(loss) / float(exact_loss) - 1) < 0.002

    difference = total = 0.0
    gradients = leaf_names(gradients)
    for name, expected in leaf_names(exact).items():
        assert gradients[name].dtype == np.float32
        if name in (ZERO_GRADIENT, "backbone/null_latent"):
            continue
        expected = without_key_bias(name, expected)
        error = np.linalg.norm(without_key_bias(name, gradients[name]) - expected)
        assert error < 0.1 * np.linalg.norm(expected), f"gradient of {name}"
        difference, total = difference + error**2, total + np.linalg.norm(expected) ** 2
    assert 1e-3 < math.sqrt(difference / total) < 0.03

    visible = in_order(batch["indices"], batch["order"])
    rest = batch["labels"], batch["order"], np.int32(HIDDEN), np.zeros(BATCH, bool)
    feature = jitted(TINY, "features")(params, visible, *rest)
    rough = jitted(config, "features")(params, visible, *rest)
    assert (feature.dtype, rough.dtype) == (jnp.float32, jnp.bfloat16)
    error = np.linalg.norm(np.asarray(rough, np.float32) - feature) / np.linalg.norm(feature)
    assert 1e-3 < error < 0.03
