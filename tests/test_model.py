"""The model: causality, hidden positions, padding, precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    BATCH,
    HIDDEN,
    TINY,
    ZERO_GRADIENT,
    head_method,
    in_order,
    jitted,
    leaf_names,
    loss_and_gradients,
    random_params,
    relative_error,
    tiny,
    without_key_bias,
)

from tokenbridge_jax.model import TokenBridge
from tokenbridge_jax.runtime.errors import UserError

# --- Causality in the channel order ---------------------------------------------------------------


def test_logits_of_a_channel_depend_on_exactly_the_channels_before_it(params):
    """Changed indices show that place c sees channel k if and only if k's place is before c."""
    rng = np.random.default_rng(1)
    feature = jnp.asarray(rng.normal(size=(7, TINY.decoder_width)), jnp.float32)
    indices = rng.integers(TINY.levels, size=(7, TINY.channels)).astype(np.int32)
    logits = head_method(TINY, "logits")
    before = np.asarray(logits(params, feature, indices))
    assert before.shape == (7, TINY.channels, TINY.levels)
    assert before.dtype == np.float32
    for channel in range(TINY.channels):
        changed = indices.copy()
        changed[:, channel] = (changed[:, channel] + 1) % TINY.levels
        differs = (np.asarray(logits(params, feature, changed)) != before).any(axis=-1)
        later = np.arange(TINY.channels) > TINY.channel_order.index(channel)
        np.testing.assert_array_equal(differs, np.broadcast_to(later, differs.shape))


def test_gradient_of_a_channel_reaches_exactly_the_tables_before_it(params):
    """The gradient d logits[place c] / d table of place p is zero if and only if p >= c.

    Within a table, only the row of that channel's index has a gradient. This shows that table p
    belongs to channel `channel_order[p]`.
    """
    rng = np.random.default_rng(2)
    feature = jnp.asarray(rng.normal(size=(1, TINY.decoder_width)), jnp.float32)
    indices = jnp.array([[0, 1, 2, 3]])  # Channel k has level k.
    direction = rng.normal(size=TINY.levels).astype(np.float32)

    def projected(tables):
        head = params["head"] | {"token_embeddings": tables}
        return head_method(TINY, "logits")(params | {"head": head}, feature, indices)[0] @ direction

    gradient = np.asarray(jax.jit(jax.jacrev(projected))(params["head"]["token_embeddings"]))
    reached = (gradient != 0).all(axis=-1)  # [place c, table p, level]
    np.testing.assert_array_equal(reached, (gradient != 0).any(axis=-1))
    for place in range(TINY.channels):
        for earlier in range(TINY.channels - 1):
            expected = np.zeros(TINY.levels, bool)
            expected[TINY.channel_order[earlier]] = earlier < place
            np.testing.assert_array_equal(reached[place, earlier], expected)


@pytest.mark.parametrize("order", [(0, 1, 1, 3), (0, 2), (1, 2, 3, 4), ()])
def test_channel_order_must_be_a_permutation(order: tuple[int, ...]):
    with pytest.raises(UserError, match=r"each of 0\.\.C-1 once"):
        tiny(channel_order=order)


# --- Hidden positions -----------------------------------------------------------------------------


@pytest.mark.parametrize("visible_slots", [3, 5, TINY.positions])
def test_hidden_positions_never_leak_into_features(params, batch, visible_slots: int):
    """With any padding, hidden indices change no bit of the features, and visible ones do."""
    num_hidden = np.array([5, 8, 6], np.int32)  # One per image; nothing of image 1 is visible.
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

    # Padding changes only how results are rounded.
    exact = features(params, in_order(batch["indices"], batch["order"])[:, 3 - 8 :], *rest)
    assert relative_error(before, exact) < 1e-6

    # Each visible position by itself changes every slot of its image and no other image.
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
    """In the whole model, positions do not leak into each other, nor channels into earlier ones."""
    logits = jitted(TINY)
    rest = batch["labels"], batch["order"], np.int32(HIDDEN), np.zeros(BATCH, bool)
    before = np.asarray(logits(params, batch["indices"], *rest))
    slot, channel = 2, TINY.channel_order[1]
    indices = batch["indices"].copy()
    changed = np.arange(BATCH), batch["order"][:, slot], channel
    indices[changed] = (indices[changed] + 1) % TINY.levels
    differs = (np.asarray(logits(params, indices, *rest)) != before).any(axis=-1)
    expected = np.zeros((BATCH, TINY.positions, TINY.channels), bool)
    expected[:, slot, 2:] = True
    np.testing.assert_array_equal(differs, expected)


def test_a_dropped_class_is_replaced_by_the_null_latent(params, batch):
    features = jitted(TINY, "features")
    slots = in_order(batch["indices"], batch["order"])
    rest = batch["order"], np.int32(HIDDEN)
    drop = np.array([True, False, True])
    mixed = features(params, slots, batch["labels"], *rest, drop)
    # In this model, every class embedding is the null latent.
    backbone = params["backbone"]
    null = jnp.tile(backbone["null_latent"], (TINY.classes, 1))
    no_classes = params | {"backbone": backbone | {"class_embedding": null}}
    dropped = features(no_classes, slots, batch["labels"], *rest, np.zeros(BATCH, bool))
    kept = features(params, slots, batch["labels"], *rest, np.zeros(BATCH, bool))
    np.testing.assert_array_equal(mixed, np.where(drop[:, None, None], dropped, kept))
    assert not np.isclose(dropped, kept).all(axis=(1, 2)).any()
    other = (batch["labels"] + 1) % TINY.classes
    other_class = features(params, slots, other, *rest, np.zeros(BATCH, bool))
    assert not np.isclose(other_class, kept).all(axis=(1, 2)).any()


# --- Precision ------------------------------------------------------------------------------------


def test_bfloat16_agrees_with_float32_to_its_accuracy(batch):
    """bfloat16 keeps 8 bits, so rounding changes a value by up to u = 2^-9 of it.

    About 50 roundings in series lead to a feature or gradient (forward and backward, weights
    included). Independent errors grow to sqrt(50) u = 0.014, coherent ones to 50 u = 0.1. The whole
    gradient and the features must be near the first bound, and every leaf within the second. The
    loss is a mean over many positions, so its bound is 0.002. The model does not magnify errors,
    because its weights have a spread of 0.1: rounding only them changes the gradient by 0.008.

    The bfloat16 batch repeats the float32 batch 683 times. Its mean gradient is the same, but a sum
    over it in bfloat16 stops growing when the next image is below half of its last bit.
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
