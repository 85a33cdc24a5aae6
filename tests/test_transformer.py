"""Dropout and rematerialisation: where it drops, that it drops the same when computed again."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    TINY,
    equations,
    in_order,
    loss_and_gradients,
    random_batch,
    random_params,
    tiny,
    tree_error,
)

from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.transformer import Block, ConditionedBlock, Dropout, stack_layers

BATCH = 3
HIDDEN = 6
# Threefry, the default, takes seconds to compile wherever something is dropped.
DROPOUT_KEY = jax.random.key(5, impl="rbg")


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def batch():
    return random_batch(TINY, BATCH)


def test_dropout_is_on_only_with_a_key_and_keeps_the_mean():
    ones = jnp.ones((200, 1000))
    np.testing.assert_array_equal(Dropout(0.1).apply({}, ones), ones)
    dropped = np.asarray(Dropout(0.1).apply({}, ones, rngs={"dropout": jax.random.key(0)}))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.9, rtol=1e-6)
    # Five standard deviations of a binomial.
    assert abs(kept.mean() - 0.9) < 5 * math.sqrt(0.09 / kept.size)


def test_every_layer_drops_something_else():
    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x, mask, condition, cache):
            return Dropout(0.5)(x), None

    model = stack_layers(Drop, 2)()
    x, _ = model.apply({}, jnp.ones(10_000), None, None, None, rngs={"dropout": jax.random.key(0)})
    assert abs(np.mean(np.asarray(x) == 4) - 0.25) < 5 * math.sqrt(0.1875 / 10_000)


@pytest.mark.parametrize("conditioned", [False, True])
def test_blocks_drop_attention_weights_projection_and_both_mlp_layers(conditioned: bool):
    x = jnp.ones((2, 3, 8))
    arguments = (x, jnp.ones((1, 1, 3), bool), x if conditioned else None)
    kind = ConditionedBlock if conditioned else Block

    def block(dropout):
        return kind(heads=2, dropout=dropout)

    variables = nn.unbox(block(0.1).init(jax.random.key(0), *arguments))
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    run = functools.partial(
        block(0.1).apply, variables, *arguments, rngs={"dropout": jax.random.key(1)}
    )
    names = [eqn.primitive.name for _, eqn in equations(jax.make_jaxpr(run)().jaxpr)]
    assert sum(name == "random_bits" for name in names) == 4
    # Dropping everything leaves nothing of either branch: dropout stands last in both.
    out, _ = block(1.0).apply(variables, *arguments, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(out, x)
    assert not np.isclose(block(1.0).apply(variables, *arguments)[0], x).any()


def test_every_chunk_of_the_head_drops_something_else(params):
    config = tiny(head_chunk=2, dropout=0.5)
    feature = jnp.ones((1, 6, config.decoder_width))
    indices = jnp.zeros((1, 6, config.channels), jnp.int32)
    nll = jax.jit(
        lambda rngs: TokenBridge(config).apply(
            {"params": params}, feature, indices, rngs=rngs, method="_chunked_nll"
        )
    )
    for slot in np.asarray(nll(None))[0]:
        np.testing.assert_allclose(slot, nll(None)[0, 0], rtol=1e-6)
    dropped = np.asarray(nll({"dropout": jax.random.key(0)}))[0]
    assert len(np.unique(dropped.round(5), axis=0)) == 6


def test_gradients_with_dropout_in_chunks_are_those_of_the_loss(params, batch):
    """By central differences: what is computed again must drop the same as the first time."""
    function = loss_and_gradients(tiny(dropout=0.2, head_chunk=4), 8, 8)

    def run(params, key=DROPOUT_KEY):
        return function(params, batch, np.int32(HIDDEN), key)

    (loss, _), gradients = run(params)
    assert float(run(params)[0][0]) == float(loss)
    assert abs(float(run(params, jax.random.key(6, impl="rbg"))[0][0]) - float(loss)) > 1e-3

    # Along the gradient the slope is its norm, and no other direction has that.
    slope = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    step = 1e-3

    def loss_at(distance):
        return float(
            run(jax.tree.map(lambda p, g: p + distance / slope * g, params, gradients))[0][0]
        )

    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=0.01)


def test_rematerialisation_changes_no_gradient(params, batch):
    """With dropout on, so that what is dropped has to be the same again."""

    def gradient(remat):
        config = tiny(dropout=0.2, remat=remat)

        def projected(params):
            feature = TokenBridge(config).apply(
                {"params": params},
                jnp.asarray(in_order(batch["indices"], batch["order"])),
                jnp.asarray(batch["labels"]),
                jnp.asarray(batch["order"]),
                jnp.int32(HIDDEN),
                jnp.zeros(BATCH, bool),
                rngs={"dropout": DROPOUT_KEY},
                method="features",
            )
            return jnp.sum(feature * np.random.default_rng(4).normal(size=feature.shape))

        return jax.jit(jax.grad(projected))(params)

    expected = gradient("none")
    for remat in ("dots", "full"):
        assert tree_error(gradient(remat), expected) < 1e-5


def test_rematerialisation_keeps_less():
    kept = []
    for remat in ("none", "dots", "full"):
        config = tiny(remat=remat, encoder_layers=2, decoder_layers=2)
        arguments = (
            jnp.zeros((BATCH, config.positions, config.channels), jnp.int32),
            jnp.zeros(BATCH, jnp.int32),
            jnp.zeros((BATCH, config.positions), jnp.int32),
            jnp.int32(HIDDEN),
            jnp.zeros(BATCH, bool),
        )

        def backward(params, config=config, arguments=arguments):
            def run(params):
                variables = {"params": params}
                return TokenBridge(config).apply(variables, *arguments, method="features")

            return jax.vjp(run, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, abstract_params(config)))
        kept.append(sum(leaf.size for leaf in leaves))
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]
