"""Checks one `tokenbridge_*.npz` golden against the model, sampler, optimizer and EMA."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.loss import Examples, MaskDraw, training_loss
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate
from tokenbridge_jax.torch_bridge.official import BUFFERS, table
from tokenbridge_jax.torch_bridge.table import from_torch, to_torch
from tokenbridge_jax.training.optimizer import OptimizerConfig, RunNumbers, make_optimizer
from tokenbridge_jax.training.state import abstract_state, create_state
from tokenbridge_jax.training.step import make_train_step

PARTS = {"config", "state", "in", "out", "grad", "sample_t0", "train3"}
# Parameters whose gradient is rounding noise in part or whole.
NOISE = ("qkv.bias", "k_norm.bias")


def check_model_file(path: Path) -> None:
    golden = dict(np.load(path))
    config = config_of(golden)
    state = {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}
    parameters = {k: v for k, v in state.items() if k not in BUFFERS}
    params = from_torch(table(config), parameters, abstract_params(config))
    params = jax.tree.map(jnp.asarray, params)
    back = to_torch(table(config), params)
    assert back.keys() == parameters.keys()
    assert all(np.array_equal(back[name], parameters[name]) for name in parameters)

    unknown = {name.split("/")[0] for name in golden} - PARTS
    assert not unknown, f"{path.name} holds {unknown}, which nothing checks"

    _check_quantization(golden, config)
    _check_forward(golden, config, params)
    _check_gradients(golden, config, params)
    _check_training(golden, config, params)
    _check_sampling(golden, config, params)


def sizes_of(golden: dict[str, np.ndarray]) -> dict[str, Any]:
    """The sizes that a golden's model was constructed with, by the release's names."""
    return {
        k.removeprefix("config/"): v.item() for k, v in golden.items() if k.startswith("config/")
    }


def backbone_of(size: dict[str, Any]) -> dict[str, int]:
    """The fields of `TokenBridgeConfig` for these sizes of a backbone."""
    return dict(
        positions=(size["img_size"] // 16) ** 2,
        classes=size["class_num"],
        encoder_width=size["encoder_embed_dim"],
        encoder_layers=size["encoder_depth"],
        encoder_heads=size["encoder_num_heads"],
        decoder_width=size["decoder_embed_dim"],
        decoder_layers=size["decoder_depth"],
        decoder_heads=size["decoder_num_heads"],
        buffer=size["buffer_size"],
    )


def config_of(golden: dict[str, np.ndarray]) -> TokenBridgeConfig:
    """The model a golden was made with, from its `config/*` entries."""
    size = sizes_of(golden)
    return TokenBridgeConfig(
        quantizer=Quantizer(
            level_values=tuple(golden["state/reconstruction_values"].tolist()),
            minimum=float(size.get("quant_min", -5.0)),
            maximum=float(size.get("quant_max", 5.0)),
        ),
        channel_order=KL16_CHANNEL_ORDER,
        **backbone_of(size),
        head_width=size["channel_embed_dim"],
        head_layers=size["channel_depth"],
        head_heads=size["channel_heads"],
        first_token_quirk=True,
        dtype="float32",
        head_chunk=4,
    )


def assert_close(actual, expected, tolerance: float, name: str) -> None:
    """Asserts a largest difference of `tolerance` times the expected array's largest magnitude."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    error = np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance}"


def positions_of(latents_nchw: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [B, L, C], positions row-major."""
    return latents_nchw.reshape(*latents_nchw.shape[:2], -1).transpose(0, 2, 1)


def sorted_order(mask: np.ndarray) -> np.ndarray:
    """An order with the hidden positions of `mask` in front, each group in position order."""
    return np.argsort(1 - mask, axis=1, kind="stable").astype(np.int32)


def _loss_arguments(golden: dict[str, np.ndarray]) -> tuple[Examples, jax.Array]:
    """The golden's batch, and how many positions of it are hidden."""
    mask = golden["in/mask"]
    hidden = mask.sum(axis=1).astype(np.int32)
    assert (hidden == hidden[0]).all(), "one mask ratio a batch"
    labels = golden["in/labels"].astype(np.int32)
    examples = Examples(
        jnp.asarray(golden["out/indices"]),
        jnp.asarray(labels),
        jnp.asarray(sorted_order(mask)),
        jnp.zeros(len(labels), bool),
    )
    return examples, jnp.int32(hidden[0])


def _check_quantization(golden: dict[str, np.ndarray], config: TokenBridgeConfig) -> None:
    indices = config.quantizer.quantize(jnp.asarray(positions_of(golden["in/latents_nchw"])))
    np.testing.assert_array_equal(indices, golden["out/indices"])
    np.testing.assert_array_equal(config.quantizer.dequantize(indices), golden["out/values"])


def _check_forward(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> None:
    examples, num_hidden = _loss_arguments(golden)
    indices, labels = examples.indices, examples.labels
    order, drop_class = examples.order, examples.drop_class
    hidden = int(num_hidden)
    model, variables = TokenBridge(config), {"params": params}

    def encode(model: TokenBridge) -> jax.Array:
        slots = jnp.take_along_axis(indices, order[:, hidden:, None], axis=1)
        latent = model.backbone.class_latent(labels, drop_class)
        values = config.quantizer.dequantize(slots)
        return model.backbone.encode(values, latent, order, num_hidden)

    encoded = jax.jit(lambda: model.apply(variables, method=encode))()
    assert_close(encoded, golden["out/encoder"], 1e-5, "encoder")

    # All slots go to the encoder, as padding where hidden: what padding holds must not matter.
    slots = jnp.take_along_axis(indices, order[:, :, None], axis=1)
    arguments = labels, order, num_hidden, drop_class
    features = jax.jit(lambda *x: model.apply(variables, *x, method=TokenBridge.features))
    feature = features(slots, *arguments)
    feature = np.take_along_axis(np.asarray(feature), np.argsort(order)[:, :, None], axis=1)
    assert_close(feature, golden["out/decoder"], 1e-5, "decoder")

    logits = jax.jit(lambda *x: model.apply(variables, *x))(indices, *arguments)
    logits = logits[:, :hidden].reshape(-1, config.channels, config.levels)
    expected = golden["out/logits_masked_positions_reordered_channels"]
    assert_close(logits, expected, 1e-4, "logits")


def _loss(config: TokenBridgeConfig, params: dict, golden: dict[str, np.ndarray]) -> jax.Array:
    examples, num_hidden = _loss_arguments(golden)
    draw = MaskDraw(num_hidden, config.positions, config.positions)
    return training_loss(config, params, examples, draw)


def is_rounding_noise(name: str, gradient: np.ndarray) -> np.ndarray:
    """Where a parameter's exact gradient is zero: softmax ignores a constant added to every key."""
    noise = np.zeros(gradient.shape, bool)
    if name.endswith("attn.k_norm.bias"):
        noise[:] = True
    elif re.search(r"coder_blocks\.\d+\.attn\.qkv\.bias$", name):
        third = len(gradient) // 3
        noise[third : 2 * third] = True
    return noise


def _check_gradients(
    golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict
) -> None:
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: _loss(config, p, golden)))(params)
    assert_close(loss, golden["out/loss"], 1e-5, "loss")
    gradients = to_torch(table(config), gradients)
    for name, gradient in gradients.items():
        kept = ~is_rounding_noise(name, gradient)
        expected = golden[f"grad/{name}"]
        assert_close(gradient * kept, expected * kept, 1e-4, f"gradient of {name}")


class _GoldenTask:
    """The golden's batch and mask at every step, from the golden's weights."""

    def __init__(self, config: TokenBridgeConfig, params: dict, golden: dict[str, np.ndarray]):
        self._config, self._params, self._golden = config, params, golden

    def init(self, key):
        return jax.tree.map(jnp.asarray, self._params)

    def examples(self, batch, key, draw):
        return None

    def loss(self, params, examples, key, draw):
        return _loss(self._config, params, self._golden), {}


def _check_training(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> None:
    """Three steps of clipping, AdamW and EMA."""
    name = next(k for k in golden if k.startswith("train3/losses"))
    rate, decay, beta1, beta2, clip = map(
        float, re.search(r"_lr([^_]+)_wd([^_]+)_b([^_]+)_([^_]+)_clip([^_]+)$", name).groups()
    )
    average = next(k for k in golden if k.startswith("train3/ema")).split("/")[1]
    ema_decay = float(average.removeprefix("ema"))
    settings = OptimizerConfig(
        learning_rate=rate,
        total_steps=3,
        schedule="constant",
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        clip=clip,
    )
    optimizer, _ = make_optimizer(settings)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    task = _GoldenTask(config, params, golden)
    abstract = abstract_state(task.init, optimizer, mesh)
    state = create_state(task.init, optimizer, abstract, seed=0)
    make = functools.partial(make_optimizer, settings)
    step = make_train_step(task, make, abstract, mesh, ema_decay=ema_decay)
    losses, norms = [], []
    with meshes.use_mesh(mesh):
        for _ in range(3):
            state, metrics = step(state, None, None, RunNumbers.of(settings, seed=0))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, golden[name], rtol=1e-5)
    np.testing.assert_allclose(norms, golden["train3/grad_norms_before_clip"], rtol=1e-4)
    for prefix, tree in (("params", state.params), (average, state.ema_params)):
        for name, value in to_torch(table(config), tree).items():
            # Adam blows rounding noise up to whole steps: leave out what has no gradient but that.
            # (A gradient of exactly zero has none: the null latent, which still decays.)
            gradient = np.abs(golden[f"grad/{name}"])
            kept = (gradient == 0) | (gradient > 1e-6 * gradient.max())
            assert kept.mean() > 0.98 or name.endswith(NOISE), f"{name}: hardly any gradient"
            kept &= ~is_rounding_noise(name, value)
            error = np.max(np.abs(value - golden[f"train3/{prefix}/{name}"]) * kept)
            assert error <= 1e-4, f"{prefix} of {name} after three steps: {error:.2e}"


def _check_sampling(golden: dict[str, np.ndarray], config: TokenBridgeConfig, params: dict) -> None:
    runs = {k.split("/")[1] for k in golden if k.startswith("sample_t0/")}
    assert runs, "the file holds no samples"
    labels = jnp.asarray(golden["in/labels"].astype(np.int32))
    for run in sorted(runs):
        num_iter, guidance, schedule = re.fullmatch(r"iter(\d+)_cfg([\d.]+)_(\w+)", run).groups()
        indices = generate(
            config,
            params,
            Request(
                labels,
                jnp.arange(len(labels)),
                orders=jnp.asarray(golden["in/orders"].astype(np.int32)),
            ),
            SamplingSettings(int(num_iter), float(guidance), schedule, temperature=0.0),
        )
        np.testing.assert_array_equal(indices, golden[f"sample_t0/{run}/indices"], err_msg=run)
        latents = positions_of(golden[f"sample_t0/{run}/latents_nchw"])
        np.testing.assert_array_equal(config.quantizer.dequantize(indices), latents, err_msg=run)
