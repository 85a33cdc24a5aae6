"""The model against mathematics: causality, leaks, padding, precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    TINY,
    ZERO_GRADIENT,
    in_order,
    jitted,
    leaf_names,
    loss_and_gradients,
    random_batch,
    random_params,
    relative_error,
    tiny,
    without_key_bias,
)

from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.runtime.errors import UserError

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


# --- Precision ------------------------------------------------------------------------------------


def test_bfloat16_agrees_with_float32_to_its_accuracy(batch):
    """bfloat16 keeps 8 bits: rounding to it errs by up to u = 2^-9 of a value.

    A feature or gradient has gone through some 50 roundings in series (forward and back, weights
    included). Independent errors grow to sqrt(50) u = 0.014, coherent ones to 50 u = 0.1. All of
    the gradient, and all of the features, must come near the first, any one leaf within the second.
    The loss depends on the rounding of many positions at once: 0.002. Weights of 0.1 keep the model
    itself from magnifying errors: rounding nothing but them changes the gradient by 0.008.

    The batch is that of float32 683 times: its mean gradient is the same, but a sum over it in
    bfloat16 stops growing when one more image is below half of its last bit.
    """
    params = random_params(TINY, spread=0.1)
    config = tiny(dtype="bfloat16")
    slots = HIDDEN, TINY.positions - HIDDEN
    arguments = params, batch, np.int32(HIDDEN), None
    exact_loss, exact = loss_and_gradients(TINY, *slots)(*arguments)
    dropped = {"drop_class": np.arange(BATCH) == 0}
    many = {name: np.tile(x, (683, *[1] * (x.ndim - 1))) for name, x in (batch | dropped).items()}
    loss, gradients = loss_and_gradients(config, *slots)(params, many, np.int32(HIDDEN), None)
    assert loss.dtype == jnp.float32
    assert 0 < abs(float(loss) / float(exact_loss) - 1) < 0.002

    difference = total = 0.0
    gradients = leaf_names(gradients)
    for name, expected in leaf_names(exact).items():
        assert gradients[name].dtype == np.float32
        if name == ZERO_GRADIENT:
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
