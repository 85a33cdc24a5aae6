"""The smallest model with every part of the real one, and weights that leave no part idle."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import AutoencoderConfig
from tokenbridge_jax.autoencoder import init_params as init_autoencoder
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.loss import Examples, MaskDraw, training_loss
from tokenbridge_jax.model import TokenBridge, TokenBridgeConfig, abstract_params
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes

# Widths differ from part to part, and the channel order is its own inverse nowhere.
TINY = TokenBridgeConfig(
    quantizer=Quantizer.gaussian(levels=5, range=3.0),
    channel_order=(2, 0, 3, 1),
    positions=8,
    classes=3,
    encoder_width=16,
    encoder_layers=1,
    encoder_heads=4,
    decoder_width=24,
    decoder_layers=1,
    decoder_heads=4,
    head_width=16,
    head_layers=1,
    head_heads=4,
    buffer=2,
    dropout=0.0,
    dtype="float32",
    head_chunk=4096,
)
# A position of it is 2x2 pixels.
AUTOENCODER = AutoencoderConfig(
    image_size=8,
    image_channels=1,
    channels=8,
    multipliers=(1, 1),
    blocks=1,
    attention_resolutions=(),
    latent_channels=4,
)
# Gradients that are zero in exact arithmetic: softmax ignores a constant added to every key.
ZERO_GRADIENT = "head/blocks/attn/k_norm/bias"


def tiny(**changes: Any) -> TokenBridgeConfig:
    """TINY with some fields changed."""
    return dataclasses.replace(TINY, **changes)


def random_params(config: TokenBridgeConfig, seed: int = 0, spread: float = 0.3) -> dict[str, Any]:
    """Random numbers in every leaf: freshly drawn, AdaLN-Zero would shut half of the head off."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = spread * rng.normal(size=leaf.shape) + (path[-1] == "scale")
        return jnp.asarray(values, leaf.dtype)

    leaves = traverse_util.flatten_dict(abstract_params(config))
    return traverse_util.unflatten_dict({k: draw(k, leaf) for k, leaf in sorted(leaves.items())})


def random_batch(config: TokenBridgeConfig, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random indices, labels and orders."""
    rng = np.random.default_rng(seed)
    shape = (size, config.positions, config.channels)
    return dict(
        indices=rng.integers(config.levels, size=shape).astype(config.quantizer.index_dtype),
        labels=rng.integers(config.classes, size=size).astype(np.int32),
        order=np.stack([rng.permutation(config.positions) for _ in range(size)]).astype(np.int32),
    )


def tiny_pipeline(config: TokenBridgeConfig, params: dict[str, Any]) -> Pipeline:
    """Grey images, a position 2x2 pixels; classes "cat", "dog" and "7"."""
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    weights = init_autoencoder(AUTOENCODER, jax.random.key(0))
    codec = Codec(AUTOENCODER, weights, config.quantizer, mesh)
    return Pipeline(ModelDescription(config, ("cat", "dog", "7"), ""), params, codec, mesh)


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Numbers from a standard normal."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def triton_kernels(traced: jax.stages.Traced) -> dict[str, int]:
    """How many Triton kernels a program runs on each platform."""
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu", "tpu")}
    return {platform: text.count("gpu.triton") for platform, text in texts.items()}


def in_order(indices: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Positions row-major -> order layout."""
    return np.take_along_axis(indices, order[:, :, None], axis=1)


def leaf_names(tree: Any) -> dict[str, np.ndarray]:
    """A tree's leaves by their paths, `head/blocks/attn/qkv/kernel`."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference over the expected array's largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def examples(batch: dict[str, Any]) -> Examples:
    """A batch as the loss takes it: the first image's class is dropped, unless the batch says."""
    first = jnp.arange(len(batch["labels"])) == 0
    return Examples(**{"drop_class": first} | jax.tree.map(jnp.asarray, batch))


@functools.cache
def loss_and_gradients(
    config: TokenBridgeConfig, hidden_slots: int, visible_slots: int, head_fraction: float = 1.0
):
    """Jitted `(params, batch, num_hidden, dropout key) -> loss, gradients`; see `examples`."""

    def run(params, batch, num_hidden, key):
        draw = MaskDraw(num_hidden, hidden_slots, visible_slots)
        return training_loss(config, params, examples(batch), draw, key, head_fraction)

    return jax.jit(jax.value_and_grad(run))


@functools.cache
def jitted(config: TokenBridgeConfig, method: str | Callable[..., Any] = "__call__"):
    """Jitted `(params, *arguments) -> method's output`."""
    return jax.jit(
        lambda params, *arguments: TokenBridge(config).apply(
            {"params": params}, *arguments, method=method
        )
    )


def tree_error(actual, expected) -> float:
    """Largest relative error over the leaves whose gradient is not zero in exact arithmetic."""
    actual, expected = leaf_names(actual), leaf_names(expected)
    return max(
        relative_error(without_key_bias(name, leaf), without_key_bias(name, expected[name]))
        for name, leaf in actual.items()
        if name != ZERO_GRADIENT and np.any(expected[name])
    )


def without_key_bias(name: str, gradient: np.ndarray) -> np.ndarray:
    """The backbone's key bias has no gradient either; the head's does, as its keys are normed."""
    if name.startswith("backbone") and name.endswith("qkv/bias"):
        gradient = np.delete(gradient, 1, axis=1)
    return gradient


def equations(jaxpr, repeated: int = 1):
    """Every equation of a program as this platform runs it, with how often it runs."""
    for eqn in jaxpr.eqns:
        yield repeated, eqn
        times = repeated * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        inner = list(jax.extend.core.jaxprs_in_params(eqn.params))
        # The last is for platforms without a branch of their own.
        for jaxpr_inside in inner[-1:] if eqn.params.get("branches_platforms") else inner:
            yield from equations(jaxpr_inside, times)


def bfloat16_sums(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The sums of more than two numbers each that a function's gradient takes in bfloat16.

    Products count for nothing: accelerators add theirs up in float32.
    """
    jaxpr = jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr
    sums = []
    for _, equation in equations(jaxpr):
        name, result = equation.primitive.name, equation.outvars[0].aval if equation.outvars else 0
        if name in ("reduce_sum", "scatter-add", "cumsum") and result.dtype == jnp.bfloat16:
            added = equation.invars[-1].aval
            if name != "reduce_sum" or added.size > 2 * result.size:
                sums.append(f"{name} of {added.str_short()} to {result.str_short()}")
    return sums
