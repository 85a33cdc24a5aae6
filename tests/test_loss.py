"""The loss equals a mean over all logits, for any chunks, slots, layers and devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from tiny_model import (
    BATCH,
    DROPOUT_KEY,
    HIDDEN,
    TINY,
    bfloat16_sums,
    equations,
    examples,
    in_order,
    jitted,
    lay_out,
    leaf_names,
    loss_and_gradients,
    random_batch,
    random_params,
    tiny,
    tree_error,
)

from tokenbridge_jax.loss import Examples, MaskDraw, image_nll, sum_over_chunks, training_loss
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes

# --- Value and gradients --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brute_force(params, batch):
    """From all logits: NLL `[B, C]` of images in float64, and gradients of the mean."""
    targets = in_order(batch["indices"], batch["order"])[:, :HIDDEN, TINY.channel_order]

    def mean_nll(params):
        rest = np.int32(HIDDEN), np.arange(BATCH) == 0
        logits = jitted(TINY)(params, *batch.values(), *rest)
        log_probability = jax.nn.log_softmax(logits)[:, :HIDDEN]
        chosen = jnp.take_along_axis(log_probability, targets[..., None].astype(np.int32), axis=-1)
        return -jnp.mean(chosen), logits

    gradients, logits = jax.grad(mean_nll, has_aux=True)(params)
    log_probability = special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    nll = np.zeros((BATCH, HIDDEN, TINY.channels))
    for image, slot, place in np.ndindex(nll.shape):
        position, channel = batch["order"][image, slot], TINY.channel_order[place]
        index = batch["indices"][image, position, channel]
        nll[image, slot, channel] = -log_probability[image, slot, place, index]
    return nll.mean(axis=1), gradients


@pytest.fixture(scope="module")
def padded(params, batch):
    """Loss and gradients with all slots in one chunk; two slots are padding."""
    return loss_and_gradients(TINY, 8, 8)(params, batch, np.int32(HIDDEN), None)


def test_loss_is_the_mean_over_hidden_positions_and_channels(padded, brute_force):
    value, gradients = padded
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, brute_force[0].mean(), rtol=1e-6)
    assert tree_error(gradients, brute_force[1]) < 5e-5
    # Every parameter has a gradient.
    assert all(leaf.any() for leaf in leaf_names(gradients).values())
    # So has each shift, scale and gate of AdaLN.
    for name, chunks in (("blocks/modulation", 6), ("final_modulation", 2)):
        kernel = np.moveaxis(leaf_names(gradients)[f"head/{name}/kernel"], -2, 0)
        assert len(kernel) == chunks
        assert kernel.any(axis=tuple(range(1, kernel.ndim))).all()


@pytest.mark.parametrize(
    "changes", [dict(head="parallel"), dict(channels_per_group=2, dropout=0.1, remat="full")]
)
def test_all_large_sums_are_float32(batch, changes):
    """On every platform, not only where the compiler adds bfloat16 numbers in float32 by itself."""
    config = tiny(dtype="bfloat16", head_chunk=11, **changes)

    def mean(params):
        draw = MaskDraw(jnp.int32(HIDDEN), 8, 4)
        return training_loss(config, params, examples(batch), draw, DROPOUT_KEY)

    assert bfloat16_sums(mean, abstract_params(config)) == []


# Chunks of all slots, of 3 (8 are 3 + 3 + 2), of 5 (4 + 4), and of 1: fewer positions than images.
@pytest.mark.parametrize(
    ("head_chunk", "hidden_slots", "visible_slots"),
    [(4096, 6, 2), (11, 8, 2), (15, 8, 4), (1, 7, 3)],
)
def test_neither_padding_nor_chunks_change_loss_or_gradients(
    params, batch, brute_force, head_chunk: int, hidden_slots: int, visible_slots: int
):
    function = loss_and_gradients(tiny(head_chunk=head_chunk), hidden_slots, visible_slots)
    value, gradients = function(params, batch, np.int32(HIDDEN), None)
    np.testing.assert_allclose(value, brute_force[0].mean(), rtol=1e-6)
    # Other slots and chunks add the same float32 terms in another order.
    assert tree_error(gradients, brute_force[1]) < 5e-5


@pytest.mark.parametrize("config", [TINY, tiny(head_chunk=11, scan_layers=False)])
def test_image_nll_is_the_mean_of_every_image_and_channel(params, batch, brute_force, config):
    run = jax.jit(functools.partial(image_nll, config))
    nll = run(params, examples(batch), MaskDraw(np.int32(HIDDEN), 8, 8))
    np.testing.assert_allclose(nll, brute_force[0], rtol=2e-6)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_unrolled_layers_give_the_loss_and_gradients_of_the_scan(batch, remat: str):
    layers = dict(encoder_layers=2, head_layers=2)
    params = random_params(tiny(**layers), spread=0.2)
    arguments = params, batch, np.int32(HIDDEN), None
    expected, expected_gradients = loss_and_gradients(tiny(**layers), 8, 8)(*arguments)
    config = tiny(**layers, scan_layers=False, remat=remat, head_chunk=12)
    value, gradients = loss_and_gradients(config, 8, 8)(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # The gradients have the scan's layout, so training, averaging and saving do not change.
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    assert tree_error(gradients, expected_gradients) < 5e-5


# --- Memory ---------------------------------------------------------------------------------------


def test_head_chunk_bounds_what_exists_at_once():
    """No value of grad(loss) has all hidden positions x channels x levels (or x head width)."""
    images, chunk = 4, 2
    config = dict(
        quantizer=Quantizer.gaussian(levels=64), positions=32, head_width=32, decoder_width=8,
        encoder_heads=2, decoder_heads=2,
    )  # fmt: skip
    everything = tiny(**config)
    at_once = images * everything.positions * everything.channels * everything.head_width
    all_logits = images * everything.positions * everything.channels * everything.levels
    assert _largest_value(everything, images) >= all_logits > at_once
    for scan_layers in (True, False):
        config = config | dict(scan_layers=scan_layers, head_chunk=images * chunk)
        assert _largest_value(tiny(**config), images) < at_once


def _largest_value(config: TokenBridgeConfig, images: int) -> int:
    """The number of elements of the largest value in the gradient's program, loops included."""
    batch = random_batch(config, images)
    draw = MaskDraw(jnp.int32(config.positions), config.positions, config.positions)
    run = jax.grad(lambda params: training_loss(config, params, examples(batch), draw))
    jaxpr = jax.make_jaxpr(run)(abstract_params(config))
    values = (v.aval for _, eqn in equations(jaxpr.jaxpr) for v in eqn.outvars)
    return max(math.prod(aval.shape) for aval in values if hasattr(aval, "shape"))


def test_a_sum_over_chunks_has_the_gradients_of_the_sum():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.float32(0.5)}
    inputs = (jnp.asarray(rng.normal(size=(5, 2, 3)), jnp.float32), jnp.arange(5.0))
    rest = jnp.arange(5), jax.random.split(jax.random.key(0), 5)

    def function(params, inputs, rest):
        (x, y), (number, key) = inputs, rest
        z = jnp.tanh(x @ params["a"]) * jax.random.normal(key, (2, 4)) * (number + 1)
        return jnp.sum(z**2) * params["b"] + y**2 * params["b"] ** 2

    def total(params, inputs):
        return sum_over_chunks(function, params, inputs, rest)

    def plain(params, inputs):
        chunks = [jax.tree.map(lambda x, i=i: x[i], (inputs, rest)) for i in range(5)]
        return sum(function(params, *chunk) for chunk in chunks)

    np.testing.assert_allclose(total(params, inputs), plain(params, inputs), rtol=1e-6)
    # The sum is part of another function, so that the gradient with respect to it is not 1.
    for outer in (lambda x: x, lambda x: -3 * x, lambda x: jnp.sin(x) * x):
        gradients = [
            jax.jit(jax.value_and_grad(lambda *x, f=f, g=outer: g(f(*x)), argnums=(0, 1)))(
                params, inputs
            )
            for f in (total, plain)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *gradients)


def test_a_sum_over_chunks_runs_forward_once_and_keeps_only_gradients():
    params, inputs = jnp.ones((4, 4)), jnp.ones((6, 50, 4))

    def function(params, x, rest):
        return jnp.sum(jnp.exp(jnp.exp(x @ params)))

    def total(params, inputs):
        return sum_over_chunks(function, params, inputs, None)

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(params, inputs)
    # One product in the forward pass, and one per argument in the backward pass.
    products = [n for n, eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert products == [6, 6, 6]
    kept = jax.eval_shape(lambda *x: jax.vjp(total, *x)[1], params, inputs)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(kept)) == [(4, 4), (6, 50, 4)]


# --- A share of the hidden positions --------------------------------------------------------------


def test_the_loss_of_a_share_estimates_the_whole(params, batch, brute_force):
    """If every hidden position comes first equally often, the mean of the estimates is the loss.

    The order of an image's hidden positions does not change the problem.
    """
    function = loss_and_gradients(tiny(head_chunk=3), HIDDEN, TINY.positions, 1 / 3)
    estimates = []
    for turn in range(HIDDEN):
        order = batch["order"].copy()
        order[:, :HIDDEN] = np.roll(order[:, :HIDDEN], turn, axis=1)
        estimates.append(function(params, batch | {"order": order}, np.int32(HIDDEN), None))
    values = np.array([float(value) for value, _ in estimates])
    assert values.std() > 0.01
    np.testing.assert_allclose(values.mean(), brute_force[0].mean(), rtol=2e-6)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *(gradients for _, gradients in estimates))
    assert tree_error(mean, brute_force[1]) < 5e-5


def test_random_orders_make_it_an_unbiased_estimate(params, batch):
    """The mean over orders as training draws them, with other positions hidden by each."""
    draws = 400
    rng = np.random.default_rng(0)
    orders = np.array([[rng.permutation(8) for _ in range(BATCH)] for _ in range(draws)], np.int32)

    def over_orders(fraction):
        @jax.jit
        def run(orders, batch):
            draw = MaskDraw(jnp.int32(HIDDEN), 8, 8)

            def one(order):
                replaced = batch.replace(order=order)
                return training_loss(TINY, params, replaced, draw, head_fraction=fraction)

            return jax.lax.map(one, orders)

        return np.asarray(run(orders, examples(batch)))

    share, whole = over_orders(0.25), over_orders(1.0)
    difference = share - whole
    assert difference.std() > 0.05
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(draws)


@pytest.mark.parametrize(("fraction", "hidden"), [(0.5, 4), (0.5, 3), (0.01, 1)])
def test_a_share_that_holds_all_hidden_positions_is_the_loss(
    params, batch, fraction: float, hidden: int
):
    """The share is a share of the slots, and padding among them does not change the loss."""
    arguments = params, batch, np.int32(hidden), None
    share, gradients = loss_and_gradients(TINY, 8, 8, fraction)(*arguments)
    whole, expected = loss_and_gradients(TINY, 8, 8)(*arguments)
    np.testing.assert_allclose(share, whole, rtol=1e-6)
    assert tree_error(gradients, expected) < 5e-5


# --- Dropout --------------------------------------------------------------------------------------


def test_every_chunk_of_the_head_drops_something_else(params):
    """All positions are equal and ignore the backbone, so only dropout makes them differ."""
    config = tiny(head_chunk=2, dropout=0.5)
    proj = jax.tree.map(jnp.zeros_like, params["head"]["condition_proj"])
    params = params | {"head": params["head"] | {"condition_proj": proj}}
    batch = dict(
        indices=jnp.zeros((1, 8, 4), jnp.uint8),
        labels=jnp.zeros(1, jnp.int32),
        order=jnp.arange(8)[None],
        drop_class=jnp.zeros(1, bool),
    )

    @jax.jit
    def mean(num_hidden, key):
        return training_loss(config, params, Examples(**batch), MaskDraw(num_hidden, 6, 8), key)

    def slot_nll(key):
        """The loss of each slot, from sums over the first slots."""
        return np.diff([n * float(mean(np.int32(n), key)) for n in range(1, 7)], prepend=0)

    alike = slot_nll(None)
    np.testing.assert_allclose(alike, alike[0], rtol=1e-5)
    differences = np.diff(np.sort(slot_nll(DROPOUT_KEY)))
    assert differences.min() > 1e-3


def test_gradients_with_dropout_in_chunks_are_those_of_the_loss(params, batch):
    """Central differences: what the backward pass computes again must drop the same elements."""
    function = loss_and_gradients(tiny(dropout=0.2, head_chunk=12), 8, 8)

    def run(params, key=DROPOUT_KEY):
        return function(params, batch, np.int32(HIDDEN), key)

    value, gradients = run(params)
    assert float(run(params)[0]) == float(value)
    assert abs(float(run(params, jax.random.key(6))[0]) - float(value)) > 1e-3

    # Along the gradient, the slope is the gradient's norm; in all other directions it is less.
    slope = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    step = 1e-3

    def loss_at(distance):
        return float(run(jax.tree.map(lambda p, g: p + distance / slope * g, params, gradients))[0])

    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=0.01)


# On the second mesh, each device goes through the chunks by itself.
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1)])
def test_dropout_of_the_same_chunks_does_not_depend_on_the_devices(sizes):
    """The loss and the gradients of two chunks are equal on one device and on eight."""
    images = 8
    params, batch = random_params(TINY, spread=0.1), random_batch(TINY, images)
    rest = np.int32(HIDDEN), DROPOUT_KEY
    one = tiny(dropout=0.2, scan_layers=False, head_chunk=4 * images)
    expected, expected_gradients = loss_and_gradients(one, 8, 8)(params, batch, *rest)

    mesh = meshes.make_mesh(*sizes)
    # Each batch shard has its share of the images.
    eight = dataclasses.replace(one, head_chunk=4 * images // meshes.batch_shards(mesh))
    with meshes.use_mesh(mesh):
        function = loss_and_gradients(eight, 8, 8)
        arguments = lay_out(params, eight, mesh), meshes.to_global(batch, mesh)
        value, gradients = function(*arguments, *rest)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert tree_error(gradients, expected_gradients) < 5e-5


@pytest.mark.parametrize(("sizes", "expected"), [((4, 2, 1), False), ((4, 1, 2), True)])
def test_devices_add_the_gradients_of_the_head_once(sizes, expected: bool):
    """Not in the loop over chunks, unless the axis `tensor` splits the head."""
    mesh, images = meshes.make_mesh(*sizes), 8
    config = tiny(scan_layers=False, head_chunk=1)
    with meshes.use_mesh(mesh):
        batch = meshes.to_global(random_batch(config, images), mesh)
        arguments = lay_out(random_params(config), config, mesh), batch, np.int32(HIDDEN), None
        text = loss_and_gradients(config, 8, 8).lower(*arguments).compile().as_text()
    computation = re.compile(
        r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL
    )
    texts = dict(computation.findall(text))

    def reduces(name: str) -> bool:
        called = re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", texts[name])
        return "all-reduce" in texts[name] or any(map(reduces, called))

    loops = re.findall(r" while\(.*body=%?([\w.-]+)", text)
    assert loops
    assert any(map(reduces, loops)) == expected
    assert "all-reduce" in text
