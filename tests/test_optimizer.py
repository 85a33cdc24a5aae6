"""AdamW, clipping and schedules against float64 numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenbridge_jax.training.optimizer import (
    OptimizerConfig,
    RunNumbers,
    clip_by_global_norm,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)


def reference_adamw(params, gradients, config, rates):
    """Textbook AdamW with decoupled decay, one float64 array at a time."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t, (step_gradients, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in step_gradients.values()))
        factor = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
        for name, gradient in step_gradients.items():
            g = gradient.astype(np.float64) * factor
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
            unbiased_first = first[name] / (1 - config.beta1**t)
            unbiased_second = second[name] / (1 - config.beta2**t)
            if name not in ("bias", "scale"):
                params[name] *= 1 - rate * config.weight_decay
            params[name] -= rate * unbiased_first / (np.sqrt(unbiased_second) + 1e-8)
    return params


def test_the_discriminator_has_its_own_rate():
    """Adam's first update is the learning rate times the sign of the gradient."""
    params = {"decoder": {"bias": jnp.ones(3)}, "discriminator": {"bias": jnp.ones(3)}}
    gradient = jnp.array([1.0, -2.0, 3.0])
    config = OptimizerConfig(0.1, 5, clip=0.0, weight_decay=0.0, discriminator_rate=0.25)
    optimizer, _ = make_optimizer(config)
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(lambda _: gradient, params), state, params)
    for name, rate in (("decoder", 0.1), ("discriminator", 0.025)):
        np.testing.assert_allclose(updates[name]["bias"], -rate * np.sign(gradient), rtol=1e-5)
    plain, _ = make_optimizer(OptimizerConfig(0.1, 5, clip=0.0))
    assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))


@pytest.mark.parametrize("clip", [0.0, 1.0, 100.0])
def test_adamw_with_clip_and_decay_equals_numpy(clip):
    rng = np.random.default_rng(0)
    # Layers are stacked: `bias` and `scale` have rank 2 and must not decay, `mask_token` does.
    shapes = {"kernel": (3, 4), "bias": (2, 4), "scale": (2, 4), "mask_token": (4,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {name: (3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(5)
    ]
    config = OptimizerConfig(
        learning_rate=0.1, total_steps=5, warmup_steps=2, weight_decay=0.5, clip=clip
    )
    optimizer, schedule = make_optimizer(config)
    mine = {name: jnp.asarray(value) for name, value in params.items()}
    state = optimizer.init(mine)
    for step_gradients in gradients:
        updates, state = optimizer.update(step_gradients, state, mine)
        mine = optax.apply_updates(mine, updates)
    expected = reference_adamw(params, gradients, config, [float(schedule(t)) for t in range(5)])
    for name, value in expected.items():
        np.testing.assert_allclose(mine[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_state_has_one_structure_with_and_without_clipping():
    params = {"kernel": jnp.ones(2)}
    states = [
        make_optimizer(OptimizerConfig(0.1, 5, clip=clip))[0].init(params) for clip in (0.0, 1.0)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_clipping_has_the_references_formula_and_not_that_of_optax():
    gradients = {"a": jnp.array([3e-3, 0.0]), "b": jnp.array([4e-3])}  # Norm 5e-3.
    transform = clip_by_global_norm(5e-3)
    clipped, _ = transform.update(gradients, transform.init(gradients))
    # The 1e-6 in the denominator is 2e-4 of this norm.
    np.testing.assert_allclose(clipped["b"], 4e-3 * 5e-3 / (5e-3 + 1e-6), rtol=1e-6)
    unclipped, _ = clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_array_equal(unclipped["a"], gradients["a"])


def test_the_leaf_name_decides_about_decay():
    params = {
        "block": {"kernel": 0, "bias": 0, "norm": {"scale": 0, "bias": 0}},
        "mask_token": 0,
        "null_latent": 0,
        "scale": {"embedding": 0},
    }
    assert decay_mask(params) == {
        "block": {"kernel": True, "bias": False, "norm": {"scale": False, "bias": False}},
        "mask_token": True,
        "null_latent": True,
        "scale": {"embedding": True},
    }


def test_the_head_may_be_spared_from_decay():
    """MAR's recipe. Without gradients, an update is decay alone."""
    config = OptimizerConfig(0.1, 5, weight_decay=0.5, decay_head=False)
    params = {part: {"kernel": jnp.ones(2), "bias": jnp.ones(2)} for part in ("backbone", "head")}
    optimizer, _ = make_optimizer(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["backbone"]["kernel"], -0.05)
    for still in (updates["backbone"]["bias"], *updates["head"].values()):
        assert np.array_equal(still, np.zeros(2))


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (4, 10), (10, 10)])
def test_schedules_by_formula(warmup, total):
    peak = 0.3
    numbers = RunNumbers.of(OptimizerConfig(peak, total, warmup), seed=0)

    def compiled(kind):
        # As in training, where the numbers are arguments.
        rate = jax.jit(lambda step, numbers: learning_rate_schedule(kind, numbers)(step))
        return lambda step: rate(step, numbers)

    cosine, constant = compiled("cosine"), compiled("constant")
    for step in range(total):
        if step < warmup:
            expected = expected_constant = peak * step / warmup
        else:
            expected_constant = peak
            expected = peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        assert float(cosine(step)) == pytest.approx(expected, rel=1e-5, abs=1e-8)
        assert float(constant(step)) == pytest.approx(expected_constant, rel=1e-6)
    assert float(constant(total)) == pytest.approx(peak)
    if warmup < total:
        assert float(cosine(total)) == pytest.approx(0, abs=1e-7)
