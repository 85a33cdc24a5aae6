"""Where the layers drop, and that rematerialisation drops the same elements again."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from tiny_model import BATCH, DROPOUT_KEY, HIDDEN, equations, in_order, jitted, tiny, tree_error

from tokenbridge_jax.layers import Dense
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.transformer import Block, ConditionedBlock, Dropout, stack_layers, unstack


def test_a_parameter_that_is_there_is_looked_up_and_not_drawn():
    drawn = []

    def init(key, shape):
        drawn.append(shape)
        return jnp.ones(shape)

    dense = Dense((3,), (None, None), init=init)
    x = jnp.arange(8.0).reshape(4, 2)
    variables = nn.unbox(nn.Module.init(dense, jax.random.key(0), x))
    variables["params"]["kernel"] = kernel = jnp.arange(6.0).reshape(2, 3)
    assert drawn == [(2, 3)]
    np.testing.assert_array_equal(dense.apply(variables, x), x @ kernel)
    assert drawn == [(2, 3)]
    with pytest.raises(ScopeParamShapeError):
        dense.apply(variables, jnp.ones((4, 5)))


def test_dropout_is_on_only_with_a_key_and_keeps_the_mean():
    ones = jnp.ones((200, 1000))
    np.testing.assert_array_equal(Dropout(0.1).apply({}, ones), ones)
    dropped = np.asarray(Dropout(0.1).apply({}, ones, rngs={"dropout": jax.random.key(0)}))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.9, rtol=1e-6)
    # Five standard deviations of a binomial distribution.
    assert abs(kept.mean() - 0.9) < 5 * math.sqrt(0.09 / kept.size)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_layer_drops_something_else(scan_layers: bool):
    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x, shared):
            return Dropout(0.5)(x), None

    model = stack_layers(Drop, 2, scan_layers=scan_layers)()
    x, _ = model.apply({}, jnp.ones((1, 10, 1000)), None, rngs={"dropout": jax.random.key(0)})
    assert abs(np.mean(np.asarray(x) == 4) - 0.25) < 5 * math.sqrt(0.1875 / 10_000)


@pytest.mark.parametrize("conditioned", [False, True])
def test_blocks_drop_attention_weights_projection_and_both_mlp_layers(conditioned: bool):
    x = jnp.ones((2, 3, 8))
    kind = ConditionedBlock if conditioned else Block
    arguments = (x, x if conditioned else jnp.ones((1, 3), bool))

    def block(dropout):
        return kind(heads=2, dropout=dropout)

    variables = nn.unbox(block(0.1).init(jax.random.key(0), *arguments))
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    rngs = {"dropout": jax.random.key(1)}
    jaxpr = jax.make_jaxpr(lambda: block(0.1).apply(variables, *arguments, rngs=rngs))().jaxpr
    masks = [
        eqn.outvars[0].aval.shape
        for _, eqn in equations(jaxpr)
        if eqn.primitive.name == "ge" and eqn.invars[0].aval.dtype == jnp.uint32
    ]
    assert sorted(masks) == sorted([(2, 2, 3, 3), x.shape, (2, 3, 32), x.shape])
    # The two masks of the same shape differ.
    _, state = block(0.5).apply(
        variables,
        *arguments,
        rngs=rngs,
        mutable="intermediates",
        capture_intermediates=lambda module, _: isinstance(module, Dropout),
    )
    first, second = (np.asarray(y) == 0 for y in jax.tree.leaves(state))
    assert first.shape == second.shape == x.shape
    assert 0.2 < np.mean(first != second) < 0.8
    # Dropout is the last step of both branches: if it drops everything, the input is left.
    out, _ = block(1 - 2**-20).apply(variables, *arguments, rngs=rngs)
    np.testing.assert_array_equal(out, x)
    assert not np.isclose(block(0.9).apply(variables, *arguments)[0], x).any()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_rematerialisation_changes_no_gradient(params, batch, scan_layers: bool):
    """With dropout on, so the second computation must drop the same elements."""

    slots = in_order(batch["indices"], batch["order"])
    arguments = jax.tree.map(
        jnp.asarray, (slots, batch["labels"], batch["order"], HIDDEN, np.zeros(BATCH, bool))
    )

    def gradient(remat):
        config = tiny(dropout=0.2, remat=remat, scan_layers=scan_layers)

        def projected(params):
            variables = {"params": params if scan_layers else unstack(params)}
            rngs = {"dropout": DROPOUT_KEY}
            feature = TokenBridge(config).apply(variables, *arguments, rngs=rngs, method="features")
            return jnp.sum(feature * np.random.default_rng(4).normal(size=feature.shape))

        return jax.jit(jax.grad(projected))(params)

    expected = gradient("none")
    for remat in ("dots", "full"):
        assert tree_error(gradient(remat), expected) < 1e-5


def test_rematerialisation_keeps_less(batch):
    arguments = *batch.values(), np.int32(HIDDEN), np.zeros(BATCH, bool)
    kept = []
    for remat in ("none", "dots", "full"):
        config = tiny(remat=remat, encoder_layers=2, decoder_layers=2)
        features = jitted(config, "features")

        def backward(params, features=features):
            return jax.vjp(lambda params: features(params, *arguments), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, abstract_params(config)))
        kept.append(sum(leaf.size for leaf in leaves))
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]
