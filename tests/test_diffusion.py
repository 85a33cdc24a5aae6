"""The diffusion head against PyTorch and exact distributions; models of latents as a whole."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_mlp
from goldens_model import assert_close
from scipy import stats
from tiny_model import (
    head_method,
    loss_flops,
    on_mesh,
    program_flops,
    random_params,
    relative_error,
    tiny,
)
from tiny_model import tiny_pipeline as make_pipeline

from tokenbridge_jax.flops import head_flops
from tokenbridge_jax.heads import diffusion
from tokenbridge_jax.heads.conditioned_mlp import SINUSOIDS, draw_noise
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.heads.noise_schedule import NoiseSchedule
from tokenbridge_jax.loss import Examples, MaskDraw, image_loss, training_loss
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.model_config import SIZES, TokenBridgeConfig
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate
from tokenbridge_jax.torch_bridge.official import export_model, import_model, infer_sizes, table
from tokenbridge_jax.torch_bridge.table import problems

GOLDENS = Path(__file__).parent / "goldens"
MAR = json.loads((GOLDENS / "official_mar_state_dict_shapes.json").read_text())
TINY = tiny(head="diffusion", quantizer=Unquantized(), head_layers=2, head_steps=5, head_draws=3)
COUNT = 6


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, seed=2, spread=0.1)


def random_inputs(draws: int, count: int = COUNT, seed: int = 0):
    """Feature, latents, time and noise."""
    rng = np.random.default_rng(seed)
    shape = count, TINY.channels
    return (
        rng.normal(size=(count, TINY.decoder_width)).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
        rng.integers(0, 1000, (draws, count)).astype(np.int32),
        rng.normal(size=(draws, *shape)).astype(np.float32),
    )


# --- The network and its loss ---------------------------------------------------------------------


def torch_losses(state, feature, latents, time, noise):
    """MAR's head in PyTorch, float64: squared error, and the bound in bits with fixed noise."""
    betas = torch.tensor(NoiseSchedule.cosine().betas)
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1).double(), kept[:-1]])

    at = functools.partial(torch.index_select, dim=0, index=time.ravel())
    of = lambda table: at(table).reshape(*time.shape, 1)  # noqa: E731
    noisy = of(kept).sqrt() * latents + (1 - of(kept)).sqrt() * noise
    predicted, variance = torch.chunk(torch_mlp.network(state, feature, noisy, time), 2, -1)

    fixed = predicted.detach()
    data = (noisy - (1 - of(kept)).sqrt() * fixed) / of(kept).sqrt()
    first = of(betas) * of(before).sqrt() / (1 - of(kept))
    second = (1 - of(before)) * (1 - of(betas)).sqrt() / (1 - of(kept))
    posterior = betas * (1 - before) / (1 - kept)
    low = torch.log(of(torch.cat([posterior[1:2], posterior[1:]])))
    logvar = (variance + 1) / 2 * of(betas).log() + (1 - variance) / 2 * low
    true, ours = (
        torch.distributions.Normal(first * x0 + second * noisy, (lv / 2).exp())
        for x0, lv in ((latents, low), (data, logvar))
    )
    bound = torch.distributions.kl_divergence(true, ours)
    cdf = lambda x: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))  # noqa: E731
    z = lambda x: cdf((x - ours.loc) / ours.scale)  # noqa: E731
    above, below = z(latents + 1 / 255), z(latents - 1 / 255)
    chance = torch.where(latents < -0.999, above, above - below)
    chance = torch.where(latents > 0.999, 1 - below, chance)
    bound = torch.where(time[..., None] == 0, -chance.clamp(min=1e-12).log(), bound)
    return (noise - predicted) ** 2, bound / math.log(2)


def test_losses_and_gradients_are_pytorchs(params):
    inputs = random_inputs(draws=4)
    inputs[2][:2] = 0  # The likelihood of the first step, in and outside of [-1, 1].
    assert (np.abs(inputs[1]) > 1).any()
    assert (np.abs(inputs[1]) < 0.9).any()

    def loss(head, feature):
        error, bound = TokenBridge(TINY).apply(
            {"params": {"head": head}},
            feature,
            *map(jnp.asarray, inputs[1:]),
            method=lambda model, *x: model.head.losses(*x),
        )
        return jnp.mean(error + bound), (error, bound)

    with_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, found), gradients = with_gradient(params["head"], jnp.asarray(inputs[0]))

    state, feature = torch_mlp.leaves(params["head"]), torch_mlp.leaves(inputs[0])
    time = torch.tensor(inputs[2]).long()
    rest = torch.tensor(inputs[1]).double(), time, torch.tensor(inputs[3]).double()
    expected = torch_losses(state, feature, *rest)
    (expected[0] + expected[1]).mean().backward()
    for ours, theirs, name in zip(found, expected, ("error", "bound"), strict=True):
        assert_close(ours, theirs.detach(), 1e-4, name)
    assert relative_error(gradients[1], feature.grad) < 1e-4
    jax.tree.map(
        lambda ours, theirs: assert_close(ours, theirs.grad, 1e-4, "gradient"), gradients[0], state
    )


def test_what_the_loss_draws(params, monkeypatch):
    """Times are uniform, noises normal, and each position has its own."""
    seen = {}

    def record(self, feature, targets, time, noise):
        seen.update(time=time, noise=noise)
        return noise**2, noise

    monkeypatch.setattr(diffusion.DiffusionHead, "losses", record)
    keys = jax.random.split(jax.random.key(0), 3000)
    feature, latents = jnp.zeros((3000, TINY.decoder_width)), jnp.zeros((3000, TINY.channels))
    loss = TokenBridge(TINY).apply(
        {"params": params}, method=lambda model: model.head.loss(feature, latents, keys)
    )
    time, noise = np.asarray(seen["time"]), np.asarray(seen["noise"])
    assert time.shape == (3, 3000)
    assert noise.shape == (3, 3000, 4)
    np.testing.assert_allclose(loss, (noise**2 + noise).mean(axis=0), rtol=1e-5)
    assert stats.chisquare(np.bincount(time.ravel() // 50, minlength=20)).pvalue > 1e-3
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_the_training_loss_depends_on_no_device(params):
    """Each position draws the same on one device and on a mesh; without a key, always the same."""
    rng = np.random.default_rng(1)
    batch, positions = 8, TINY.positions
    examples = Examples(
        jnp.asarray(rng.normal(size=(batch, positions, TINY.channels)), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.asarray([rng.permutation(positions) for _ in range(batch)], jnp.int32),
        jnp.zeros(batch, bool),
    )
    config = dataclasses.replace(TINY, head_chunk=4)
    draw = MaskDraw(jnp.int32(6), positions, positions)
    key = jax.random.key(4)

    @jax.jit
    def run(params, examples):
        return jax.value_and_grad(
            lambda p: training_loss(config, p, examples, draw, key), allow_int=True
        )(params)

    one = run(params, examples)
    many = on_mesh(run, (params, ()), (examples, (("data", "fsdp"),)))
    assert relative_error(many[0], one[0]) < 1e-5
    errors = jax.tree.map(relative_error, many[1]["head"], one[1]["head"])
    assert max(jax.tree.leaves(errors)) < 1e-4
    for chunk in (1, 4096):
        split = dataclasses.replace(config, head_chunk=chunk)
        assert relative_error(training_loss(split, params, examples, draw, key), one[0]) < 1e-5
    other = training_loss(config, params, examples, draw, jax.random.key(5))
    assert abs(float(other) - float(one[0])) > 1e-3
    fixed = [training_loss(config, params, examples, draw) for _ in range(2)]
    assert fixed[0] == fixed[1]
    of_images = image_loss(config, params, examples, draw, jax.random.key(0))
    assert relative_error(of_images.mean(), fixed[0]) < 1e-5


def test_forward_flops_are_those_of_the_program():
    sizes = dict(encoder_layers=2, head_width=32, head_layers=3)
    config = dataclasses.replace(TINY, **sizes)
    assert loss_flops(config, 5)[0] == config.forward_flops(5)


@pytest.mark.parametrize("branches", [1, 2])
def test_flops_of_drawing_are_those_of_the_program(branches):
    """Without the embeddings of the times, which all positions share."""
    config = dataclasses.replace(TINY, head_width=32, head_layers=3)
    feature = jnp.zeros((COUNT, config.decoder_width))
    guidance = Guidance(feature, jnp.float32(2)) if branches == 2 else None
    keys = jax.random.split(jax.random.key(0), COUNT)

    def draw(params):
        return TokenBridge(config).apply(
            {"params": params},
            method=lambda model: model.head.sample(feature, keys, jnp.float32(1), guidance)[0],
        )

    found = program_flops(jax.make_jaxpr(draw)(abstract_params(config)).jaxpr)
    times = config.head_steps * 2 * 32 * (SINUSOIDS + 32)
    assert found == COUNT * head_flops(config, branches) + times


# --- Sampling -------------------------------------------------------------------------------------


def test_a_perfect_prediction_draws_the_data(monkeypatch):
    """For normal data the best prediction is known; its samples have the data's mean and spread."""
    mean, deviation, steps = 0.5, 0.3, 200
    config = dataclasses.replace(TINY, head_steps=steps)
    table = jnp.asarray(NoiseSchedule.cosine().respaced(steps).signal, jnp.float32)
    times = jnp.asarray(NoiseSchedule.cosine().respaced(steps).timesteps)

    def denoise(self, noisy, condition):
        signal = table[jnp.argmin(jnp.abs(times - condition[0, 0, 0]))]
        total = signal * deviation**2 + 1 - signal
        noise = jnp.sqrt(1 - signal) * (noisy - jnp.sqrt(signal) * mean) / total
        return diffusion.Prediction(noise, -jnp.ones_like(noise))

    params = jax.tree.map(jnp.zeros_like, random_params(config))
    monkeypatch.setattr(diffusion.DiffusionHead, "denoise", denoise)
    monkeypatch.setattr(
        diffusion.DiffusionHead,
        "time_embedding",
        lambda self, time: jnp.repeat(time[:, None].astype(jnp.float32), self.width, 1),
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn, log_probs = head_method(config, "sample")(
        params, jnp.zeros((2000, config.decoder_width)), keys, jnp.float32(1)
    )
    assert log_probs is None
    assert np.mean(drawn) == pytest.approx(mean, abs=0.02)
    assert np.std(drawn) == pytest.approx(deviation, rel=0.05)
    cold, _ = head_method(config, "sample")(
        params, jnp.zeros((2000, config.decoder_width)), keys, jnp.float32(0)
    )
    assert np.std(cold) < 0.7 * deviation


def test_clipping_bounds_the_draws_of_a_bad_prediction(monkeypatch):
    """With "there is no noise" as the prediction, each step only makes the latents larger."""
    steps, bound = 20, 2.0
    monkeypatch.setattr(
        diffusion.DiffusionHead,
        "denoise",
        lambda self, noisy, condition: diffusion.Prediction(*2 * [jnp.zeros_like(noisy)]),
    )
    keys = jax.random.split(jax.random.key(0), COUNT)

    def draw(clip: float) -> np.ndarray:
        config = dataclasses.replace(TINY, head_steps=steps, head_clip=clip)
        params = jax.tree.map(jnp.zeros_like, random_params(config))
        feature = jnp.zeros((COUNT, config.decoder_width))
        return head_method(config, "sample")(params, feature, keys, jnp.float32(1))[0]

    schedule = NoiseSchedule.cosine().respaced(steps)
    noise = [np.float64(draw_noise(keys, i, TINY.channels)) for i in range(steps + 1)]
    x = noise[steps]
    for i in reversed(range(steps)):
        data = np.clip(x / np.sqrt(schedule.signal[i]), -bound, bound)
        x = schedule.posterior_of_data[i] * data + schedule.posterior_of_noisy[i] * x
        logvar = (np.log(schedule.betas[i]) + schedule.posterior_logvar[i]) / 2
        x += (i > 0) * np.exp(logvar / 2) * noise[i]
    assert_close(draw(bound), x, 1e-5, "latents")
    assert np.abs(x).max() <= bound
    assert np.abs(draw(0.0)).max() > 100


def test_images_do_not_depend_on_the_batch_or_the_mesh(params):
    settings = SamplingSettings(3, guidance=2.0)
    labels, numbers = np.array([0, 1, 2, 0], np.int32), np.arange(4, dtype=np.int32)
    whole = generate(TINY, params, Request(labels, numbers), settings)
    assert whole.dtype == jnp.float32
    assert np.isfinite(whole).all()
    part = generate(TINY, params, Request(labels[2:], numbers[2:]), settings)
    assert relative_error(part, whole[2:]) < 1e-4
    pipelines = [make_pipeline(TINY, params, mesh) for mesh in (None, meshes.make_mesh(2, 2, 2))]
    drawn = [p.generate_indices(labels, num_iter=3, guidance=2.0) for p in pipelines]
    assert relative_error(drawn[1], drawn[0]) < 1e-4
    np.testing.assert_allclose(drawn[0], whole, rtol=1e-4, atol=1e-4)


def test_a_pipeline_of_latents(params):
    """Images are encoded to latents, drawn, decoded and edited; there are no probabilities."""
    config = dataclasses.replace(TINY, positions=16)
    pipeline = make_pipeline(config, random_params(config, spread=0.1))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    latents = pipeline.encode(images)
    assert latents.dtype == np.float32
    expected = np.asarray(pipeline.codec.encode(images).latents).reshape(2, 16, -1)
    np.testing.assert_array_equal(latents, expected)
    np.testing.assert_array_equal(
        pipeline.decode(latents), pipeline.codec.decode_latents(latents.reshape(2, 4, 4, -1))
    )
    shown = []
    drawn = pipeline.generate([0, 1], num_iter=2, preview=lambda *x: shown.append(x))
    assert drawn.shape == images.shape
    np.testing.assert_array_equal(shown[-1][2], drawn)
    mask = np.zeros((8, 8), bool)
    mask[:2] = True
    edited = pipeline.edit(images, mask, 1, num_iter=2)
    assert edited.shape == images.shape

    with pytest.raises(UserError, match=r"order='confidence' needs probabilities, which model\.he"):
        pipeline.generate([0], order="confidence")
    with pytest.raises(UserError, match="this model's head gives no probabilities"):
        pipeline.log_probs(latents, [0, 1])
    with pytest.raises(UserError, match="indices must be floats of shape"):
        pipeline.decode(np.zeros((1, 16, 4), np.int32))
    with pytest.raises(UserError, match="indices hold NaN or infinity"):
        pipeline.decode(np.full((1, 16, 4), np.nan, np.float32))


# --- The model ------------------------------------------------------------------------------------


def test_the_config_survives_json_and_refuses_what_makes_no_sense():
    assert TokenBridgeConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    for changes, message in (
        ({"channels_per_group": 2}, "'diffusion' has no groups of channels"),
        ({"first_token_quirk": True}, "first_token_quirk is for imported"),
        ({"head": "parallel"}, r"model\.head='parallel' needs indices, not latents; tokenize the"),
        ({"head_steps": 1}, r"model\.head_steps=1 must be from 2 to 1000"),
        ({"head_steps": 1001}, r"model\.head_steps=1001 must be from 2 to 1000"),
        ({"head_clip": -1.0}, r"model\.head_clip=-1\.0 must be 0 or more and finite"),
        ({"head_clip": math.nan}, r"model\.head_clip=nan must be 0 or more and finite"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, **changes)


def shapes_of(size):
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), np.float32)
        for name, shape in MAR[f"MAR-{size}"]["shapes"].items()
    }


def config_of(shapes, size):
    """The sizes that shapes tell, and the numbers of heads."""
    sizes = {k: v for k, v in infer_sizes(shapes).items() if k != "channels"}
    heads = {name: SIZES[size][name] for name in ("encoder_heads", "decoder_heads")}
    return TokenBridgeConfig(Unquantized(), tuple(range(16)), **sizes, **heads)


@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_the_released_models_have_every_name_and_shape(size):
    published, shapes = MAR[f"MAR-{size}"], shapes_of(size)
    config = config_of(shapes, size)
    expected = {k: v for k, v in SIZES[size].items() if not k.startswith("head")} | {
        "positions": 256, "buffer": 64, "classes": 1000, "head": "diffusion",
        "head_width": published["diffloss_w"], "head_layers": published["diffloss_d"],
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    params = abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published["parameters"]
    assert problems(table(config), shapes, params) == []


def test_a_state_dict_of_size_b_goes_in_and_out_bit_for_bit():
    shapes, rng = shapes_of("B"), np.random.default_rng(0)
    state = {name: rng.random(leaf.shape, np.float32) for name, leaf in shapes.items()}
    config = config_of(shapes, "B")
    back = export_model(config, import_model(config, {"model": state})["model"])
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)
