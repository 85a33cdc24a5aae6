"""The step: against numpy, against itself on other meshes, and the number of compilations."""

import jax
import numpy as np
import optax
import pytest
from tiny_model import loss_and_gradients, random_batch, random_params, tiny
from toy import ToyTask, first_devices, toy_batch, toy_training

from tokenbridge_jax.loss import Examples
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import ModelTask, make_validation, training_flops


def train(task, mesh, batches, draws=None, **settings):
    _, state, step = toy_training(task, mesh, **settings)
    history = []
    with meshes.use_mesh(mesh):
        for i, batch in enumerate(batches):
            draw = draws[i] if draws else None
            state, metrics = step(state, meshes.to_global(batch, mesh), draw)
            history.append({name: float(value) for name, value in metrics.items()})
    return state, history, step


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def check(path, a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=str(path))

    jax.tree.map_with_path(check, actual, expected)


def test_the_first_step_equals_numpy():
    """Loss, gradient norm, update and average of one step."""
    task, mesh = ToyTask(dropout=0.0, noise=0.0), first_devices(2, 2, 2)
    abstract, state, step = toy_training(task, mesh, clip=0.05, weight_decay=0.5)
    before = jax.device_get(state.params)
    batch = toy_batch(0)
    with meshes.use_mesh(mesh):
        state, metrics = step(state, meshes.to_global(batch, mesh), None)

    def loss(params):
        return task.loss(params, batch, None, None)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(before)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    assert norm > 0.05
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)
    assert float(metrics["largest"]) == pytest.approx(np.abs(batch["y"]).max())

    def updated(path, p, g):
        # After one step the two moments of Adam are g and g^2, for any betas.
        g = g * 0.05 / (norm + 1e-6)
        decay = 0.0 if path[-1].key == "bias" else 0.5
        return p * (1 - 0.01 * decay) - 0.01 * g / (np.abs(g) + 1e-8)

    expected = jax.tree.map_with_path(updated, before, gradients)
    assert_trees_close(state.params, expected)
    average = jax.tree.map(lambda p, q: 0.9 * p + 0.1 * q, before, expected)
    assert_trees_close(state.ema_params, average)
    assert float(metrics["param_norm"]) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
    assert int(state.step) == 1
    assert state.params["first"]["kernel"].sharding == abstract.params["first"]["kernel"].sharding


@pytest.fixture(scope="module")
def whole_batches():
    """Three updates with noise in the examples and no dropout, on one device."""
    task = ToyTask(dropout=0.0, noise=0.5)
    return train(task, first_devices(1, 1, 1), [toy_batch(i) for i in range(3)])


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 2), (2, 2, 2)])
def test_nothing_depends_on_the_mesh_that_splits_the_state(whole_batches, sizes):
    """Two, four and eight devices: only the order of sums differs."""
    expected_state, expected, _ = whole_batches
    task = ToyTask(dropout=0.0, noise=0.5)
    state, history, step = train(task, first_devices(*sizes), [toy_batch(i) for i in range(3)])
    for mine, other in zip(history, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert_trees_close(state, expected_state)
    assert step.func._cache_size() == 1
    kernel = state.params["first"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4 // sizes[1], 8 // sizes[2])
    adam = state.opt_state[1]
    for moment in (adam.mu, adam.nu):
        assert moment["first"]["kernel"].sharding == kernel.sharding


def test_accumulation_equals_the_whole_batch(whole_batches):
    # Noise belongs to the examples: micro-batches must not change it.
    whole_state, whole, _ = whole_batches
    task = ToyTask(dropout=0.0, noise=0.5)
    batches = [toy_batch(i) for i in range(3)]
    cut_state, cut, step = train(task, first_devices(2, 2, 2), batches, accumulation=4)
    for mine, other in zip(cut, whole, strict=True):
        # `largest` becomes the mean of the maxima of the micro-batches.
        assert mine | {"largest": 0} == pytest.approx(other | {"largest": 0}, rel=1e-5)
    assert_trees_close(cut_state, whole_state)
    assert step.func._cache_size() == 1


def test_dropout_differs_between_steps_and_micro_batches():
    """All examples are equal: only dropout can differ between steps and micro-batches."""
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 16, axis=0), toy_batch(0))
    task, mesh = ToyTask(noise=0.0), first_devices(1, 1, 1)
    _, history, _ = train(task, mesh, [batch] * 3, learning_rate=0.0, accumulation=2)
    assert len({metrics["loss"] for metrics in history}) == 3


CONFIG = tiny(dropout=0.1)
MASKS = MaskSampler(CONFIG.positions, bucket=8)


def test_validation_ignores_padding_and_batching_and_repeats():
    params, mesh = random_params(CONFIG, spread=0.02), first_devices(2, 2, 2)
    batch = random_batch(CONFIG, 12) | {"weights": np.ones(12, np.float32)}
    validate = make_validation(CONFIG, MASKS, mesh)
    with meshes.use_mesh(mesh):
        whole = validate(params, [batch])
        assert validate(params, [batch]) == whole
        first = {name: value[:8] for name, value in batch.items()}
        rest = {name: np.roll(value, 4, axis=0)[:8] for name, value in batch.items()}
        rest["weights"] = np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32)
        assert validate(params, [first, rest]) == pytest.approx(whole, rel=1e-6)
    assert 0.5 < whole / np.log(CONFIG.levels) < 2


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_training_flops_are_three_forward_passes_over_the_draws(fraction: float):
    counts = [int(MASKS.draw(0, step).num_hidden) for step in range(1000)]
    flops = {count: CONFIG.forward_flops(float(count), fraction * count) for count in set(counts)}
    sampled = 3 * np.mean([flops[count] for count in counts])
    assert training_flops(CONFIG, MASKS, fraction) == pytest.approx(sampled, rel=1e-2)


def test_the_task_measures_the_loss_of_its_share_of_slots():
    fraction = 0.5
    batch, draw = random_batch(CONFIG, 4), MASKS.draw(seed=0, step=0)
    params, key = random_params(CONFIG), jax.random.key(0)
    task = ModelTask(CONFIG, class_dropout=0.0, head_fraction=fraction)
    examples = Examples(**batch, drop_class=np.arange(4) == 0)
    value, _ = jax.jit(task.loss)(params, examples, key, draw)
    function = loss_and_gradients(CONFIG, draw.hidden_slots, draw.visible_slots, fraction)
    expected, _ = function(params, batch, draw.num_hidden, key)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
