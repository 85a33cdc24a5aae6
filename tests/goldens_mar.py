"""Checks one `mar_*.npz` golden against MAR's schedules, diffusion head, loss and sampler."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens_model import (
    assert_close,
    backbone_of,
    is_rounding_noise,
    positions_of,
    sizes_of,
    sorted_order,
)

from tokenbridge_jax.heads import diffusion
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.heads.noise_schedule import NoiseSchedule
from tokenbridge_jax.loss import Examples, MaskDraw, training_loss
from tokenbridge_jax.model import TokenBridge, merge
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.sampling.orders import sample_keys
from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate
from tokenbridge_jax.torch_bridge.official import export_model, import_model, infer_sizes, table
from tokenbridge_jax.torch_bridge.table import to_torch

PARTS = {"config", "state", "in", "out", "grad", "step", "sample", "schedule"}


def check_mar_file(path: Path) -> None:
    golden = dict(np.load(path))
    unknown = {name.split("/")[0] for name in golden} - PARTS
    assert not unknown, f"{path.name} holds {unknown}, which nothing checks"
    config = config_of(golden)
    state = {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}
    assert infer_sizes(state)["head_layers"] == config.head_layers
    params = import_model(config, {"model": state})["model"]
    back = export_model(config, params)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)

    params = jax.tree.map(jnp.asarray, params)
    check_schedules(golden)
    _check_forward(golden, config, params)
    _check_training_loss(golden, config, params)
    _check_loss_and_gradients(golden, config, params)
    _check_steps(golden, config, params)
    _check_sampling(golden, config, params)


def config_of(golden: dict[str, np.ndarray]) -> TokenBridgeConfig:
    """The model a golden was made with, from its `config/*` entries."""
    size = sizes_of(golden)
    return TokenBridgeConfig(
        quantizer=Unquantized(),
        channel_order=tuple(range(golden["out/tokens"].shape[-1])),
        **backbone_of(size),
        head="diffusion",
        head_width=size["diffloss_w"],
        head_layers=size["diffloss_d"],
        head_draws=size["diffusion_batch_mul"],
        head_steps=int(size["num_sampling_steps"]),
        dtype="float32",
    )


def check_schedules(golden: dict[str, np.ndarray]) -> None:
    train = NoiseSchedule.cosine(len(golden["schedule/train/betas"]))
    found = {"train": train, "gen": train.respaced(len(golden["schedule/gen/betas"]))}
    for name, schedule in found.items():
        arrays = {
            "betas": schedule.betas,
            "alphas_cumprod": schedule.signal,
            "posterior_variance": schedule.posterior_variance,
            "posterior_log_variance_clipped": schedule.posterior_logvar,
            "posterior_mean_coef1": schedule.posterior_of_data,
            "posterior_mean_coef2": schedule.posterior_of_noisy,
        }
        for key, array in arrays.items():
            assert_close(array, golden[f"schedule/{name}/{key}"], 1e-12, f"{name} {key}")
        np.testing.assert_array_equal(schedule.timesteps, golden[f"schedule/{name}/timestep_map"])


def _check_forward(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> None:
    np.testing.assert_array_equal(positions_of(golden["in/latents_nchw"]), golden["out/tokens"])
    assert_close(_feature(golden, config, params), golden["out/decoder"], 1e-5, "decoder")


def _feature(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> jax.Array:
    """The backbone's features by position."""
    mask, tokens = golden["in/mask"], jnp.asarray(golden["out/tokens"])
    order, hidden = sorted_order(mask), jnp.asarray(mask.sum(axis=1), jnp.int32)
    slots = jnp.take_along_axis(tokens, order[:, :, None], axis=1)
    labels = jnp.asarray(golden["in/labels"], jnp.int32)
    apply = functools.partial(TokenBridge(config).apply, method=TokenBridge.features)
    feature = jax.jit(apply)(
        {"params": params}, slots, labels, jnp.asarray(order), hidden, jnp.zeros(len(labels), bool)
    )
    return jnp.take_along_axis(feature, np.argsort(order)[:, :, None], axis=1)


def _check_training_loss(
    golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict
) -> None:
    """Over the hidden slots, with the golden's times and noises for each."""
    mask = golden["in/mask"]
    order, hidden = sorted_order(mask), int(mask[0].sum())
    labels = jnp.asarray(golden["in/labels"], jnp.int32)
    tokens = jnp.asarray(golden["out/tokens"])
    examples = Examples(tokens, labels, jnp.asarray(order), jnp.zeros(len(labels), bool))

    def of_slots(values):
        """[draws, B, L, ...] -> [draws, B L, ...] in the order of the slots."""
        index = order.reshape(1, *order.shape, *(1,) * (values.ndim - 3))
        slots = np.take_along_axis(values, index, axis=2)
        return jnp.asarray(slots.reshape(len(values), -1, *values.shape[3:]))

    time, noise = (of_slots(golden[f"in/{name}"]) for name in ("t", "noise"))

    def loss(head, feature, targets, keys):
        return sum(head.losses(feature, targets, time.astype(jnp.int32), noise)).mean(axis=0)

    draw = MaskDraw(jnp.int32(hidden), config.positions, config.positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion.DiffusionHead, "loss", loss)
        found = jax.jit(lambda params: training_loss(config, params, examples, draw))(params)
    assert_close(found, golden["out/loss"], 1e-5, "training loss")


def _check_loss_and_gradients(
    golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict
) -> None:
    time, noise = jnp.asarray(golden["in/t"], jnp.int32), jnp.asarray(golden["in/noise"])
    draws, channels = len(time), config.channels
    weights = golden["in/mask"] / golden["in/mask"].sum() / draws / channels

    def loss(params):
        feature = _feature(golden, config, params)
        tokens = jnp.asarray(golden["out/tokens"])
        error, bound = TokenBridge(config).apply(
            {"params": params},
            method=lambda model: model.head.losses(
                merge(feature),
                merge(tokens),
                time.reshape(draws, -1),
                noise.reshape(draws, -1, channels),
            ),
        )
        shape = (draws, *tokens.shape)
        error, bound = error.reshape(shape), bound.reshape(shape)
        return jnp.sum((error + bound) * weights[None, ..., None]), (error.mean(-1), bound.mean(-1))

    with_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (error, bound)), gradients = with_gradient(params)
    assert_close(error, golden["out/per_draw_mse"], 1e-5, "squared error")
    assert_close(bound, golden["out/per_draw_vb"], 1e-5, "bound")
    assert_close(error + bound, golden["out/per_draw_loss"], 1e-5, "loss of every draw")
    assert_close(value, golden["out/loss"], 1e-5, "loss")
    found = to_torch(table(config), gradients)
    absent = np.setdiff1d(np.arange(config.classes), golden["in/labels"])
    if golden["grad/class_emb.weight"][absent].any():
        # Classes that are not in the batch have no gradient: to all gradients of this file, those
        # of another batch were added. The share of the squared error is so large that its factor
        # shows; `test_diffusion.py` compares gradients, also the bound's, with PyTorch's.
        own, theirs = (
            np.concatenate([np.ravel(gradients[name]) for name in found])
            for gradients in (found, {name: golden[f"grad/{name}"] for name in found})
        )
        assert np.linalg.norm(theirs - own) / np.linalg.norm(theirs) < 0.1
        return
    for name, gradient in found.items():
        kept = ~is_rounding_noise(name, gradient)
        expected = golden[f"grad/{name}"]
        assert_close(gradient * kept, expected * kept, 1e-4, f"gradient of {name}")


def _check_steps(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> None:
    """Single reverse steps, with and without guidance."""
    schedule = NoiseSchedule.cosine().respaced(config.head_steps)
    features = [jnp.asarray(golden[f"step/in_{x}condition"]) for x in ("", "null_")]
    noise = jnp.asarray(golden["step/in_noise"]) * golden["step/temperature"].item()
    scale = jnp.float32(golden["step/cfg"])
    runs = [key.split("/")[1:] for key in golden if re.match(r"step/i\d+/", key)]
    assert runs, "the file holds no reverse steps"

    def step(model, i, guidance):
        branches = features if guidance else features[:1]
        condition = model.head.condition_proj(jnp.stack(branches, axis=1))
        times = model.head.time_embedding(jnp.asarray(schedule.timesteps))
        x = jnp.asarray(golden["step/in_x"])
        return model.head.reverse_step(
            x, i, noise, condition + times[i][None, None], schedule, guidance
        )

    apply = jax.jit(functools.partial(TokenBridge(config).apply, method=step))
    for name, kind in runs:
        i = jnp.int32(name.removeprefix("i"))
        guidance = Guidance(features[1], scale) if kind == "guided" else None
        found = apply({"params": params}, i, guidance)
        assert_close(found, golden[f"step/{name}/{kind}"], 1e-4, f"step {name} {kind}")


def _check_sampling(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> None:
    """Whole samples, with the golden's noise for every position and step."""
    labels = jnp.asarray(golden["in/labels"], jnp.int32)
    count, seed = len(labels), 0
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    keys = fold(sample_keys(seed, jnp.arange(count))[:, 1], jnp.arange(config.positions))
    known = jax.random.key_data(keys.reshape(-1))
    steps = [*golden["in/step_noise"], golden["in/start_noise"]]
    noise = jnp.asarray(steps).reshape(config.head_steps + 1, -1, config.channels)

    def given(keys, i, channels):
        of_key = (jax.random.key_data(keys)[:, None] == known[None]).all(axis=-1).argmax(axis=-1)
        return noise[i][of_key]

    runs = [key for key in golden if key.startswith("sample/")]
    assert runs, "the file holds no samples"
    orders = jnp.asarray(golden["in/orders"], jnp.int32)
    pattern = r"sample/iter(\d+)_cfg([\d.]+)_(\w+)_temp([\d.]+)/latents_nchw"
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "draw_noise", given)
        jax.clear_caches()  # Programs that draw noise themselves may be there.
        for run in runs:
            num_iter, guidance, schedule, temperature = re.fullmatch(pattern, run).groups()
            settings = SamplingSettings(
                int(num_iter), float(guidance), schedule, temperature=float(temperature)
            )
            request = Request(labels, jnp.arange(count), seed, orders)
            found[run] = generate(config, params, request, settings)
    jax.clear_caches()
    for run in runs:
        assert_close(found[run], positions_of(golden[run]), 1e-3, run)
