"""The smallest model with every part of the real one, and weights that use every part."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import AutoencoderConfig, autoencoder_hash
from tokenbridge_jax.autoencoder import init_params as init_autoencoder
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.loss import Examples, MaskDraw, training_loss
from tokenbridge_jax.model import TokenBridge, abstract_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.ops.attention import plain_attention
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.transformer import unstack

# Widths differ between parts, and no place of the channel order is its own inverse.
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
# Its gradient is zero in exact arithmetic: softmax ignores a constant added to every key.
ZERO_GRADIENT = "head/blocks/attn/k_norm/bias"
# The images of the fixture `batch`, how many positions tests hide in them, and a key.
BATCH, HIDDEN = 3, 6
DROPOUT_KEY = jax.random.key(5)


def tiny(**changes: Any) -> TokenBridgeConfig:
    """TINY with some fields changed."""
    return dataclasses.replace(TINY, **changes)


def random_params(config: TokenBridgeConfig, seed: int = 0, spread: float = 0.3) -> dict[str, Any]:
    """Random numbers in every leaf; initial weights of AdaLN-Zero would turn off half the head."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = spread * rng.normal(size=leaf.shape) + (path[-1] == "scale")
        return jnp.asarray(values, leaf.dtype)

    leaves = traverse_util.flatten_dict(abstract_params(config))
    return traverse_util.unflatten_dict({k: draw(k, leaf) for k, leaf in sorted(leaves.items())})


def random_batch(config: TokenBridgeConfig, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random indices (or latents), labels and orders."""
    rng = np.random.default_rng(seed)
    shape = (size, config.positions, config.channels)
    values = (
        rng.normal(size=shape) if config.of_latents else rng.integers(config.levels, size=shape)
    )
    return dict(
        indices=values.astype(config.quantizer.index_dtype),
        labels=rng.integers(config.classes, size=size).astype(np.int32),
        order=np.stack([rng.permutation(config.positions) for _ in range(size)]).astype(np.int32),
    )


def tiny_pipeline(
    config: TokenBridgeConfig, params: dict[str, Any], mesh: Mesh | None = None
) -> Pipeline:
    """Grey images with positions of 2x2 pixels; classes "cat", "dog" and "7"."""
    mesh = mesh or meshes.make_mesh(devices=jax.devices()[:1])
    weights = init_autoencoder(AUTOENCODER, jax.random.key(0))
    codec = Codec(AUTOENCODER, weights, config.quantizer, mesh)
    used = autoencoder_hash(AUTOENCODER, jax.tree.map(np.asarray, weights))
    description = ModelDescription(config, ("cat", "dog", "7"), used)
    return Pipeline(description, lay_out(params, config, mesh), codec, mesh)


def lay_out(params: dict[str, Any], config: TokenBridgeConfig, mesh: Mesh) -> dict[str, Any]:
    """The parameters laid out on a mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
    return jax.device_put(params, shardings)


def on_mesh(function: Callable[..., Any], *arguments: Any, sizes: Any = (2, 2, 2)) -> Any:
    """`function` on a mesh, given `(tree, mesh axes that its arrays are split over)` for each."""
    mesh = meshes.make_mesh(*sizes)
    with meshes.use_mesh(mesh):
        placed = (
            jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))
            for tree, axes in arguments
        )
        return function(*placed)


def shard_shapes(array: jax.Array) -> set[tuple[int, ...]]:
    """The shapes of the parts of an array on its devices."""
    return {shard.data.shape for shard in array.addressable_shards}


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Random numbers of a standard normal distribution."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def triton_kernels(traced: jax.stages.Traced) -> dict[str, int]:
    """How many Triton kernels a program runs on each platform."""
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu", "tpu")}
    return {platform: text.count("gpu.triton") for platform, text in texts.items()}


def in_order(indices: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Row-major positions -> order layout."""
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
    """A batch as the loss takes it; by default the class of the first image is dropped."""
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


@functools.cache
def head_method(config: TokenBridgeConfig, method: str, **settings: Any):
    """Jitted `(params, *arguments) -> output` of a method of the head; `sample` unstacks layers."""
    if method == "sample":
        config = dataclasses.replace(config, scan_layers=False)

    def run(params, *arguments):
        return TokenBridge(config).apply(
            {"params": params if config.scan_layers else unstack(params)},
            method=lambda model: getattr(model.head, method)(*arguments, **settings),
        )

    return jax.jit(run)


def tree_error(actual, expected) -> float:
    """The largest relative error, over leaves whose exact gradient is not zero."""
    actual, expected = leaf_names(actual), leaf_names(expected)
    return max(
        relative_error(without_key_bias(name, leaf), without_key_bias(name, expected[name]))
        for name, leaf in actual.items()
        if name != ZERO_GRADIENT and np.any(expected[name])
    )


def without_key_bias(name: str, gradient: np.ndarray) -> np.ndarray:
    """Removes the backbone's bias of keys, whose exact gradient is zero too.

    In the head, keys are normalized, so their bias has a gradient.
    """
    if name.startswith("backbone") and name.endswith("qkv/bias"):
        gradient = np.delete(gradient, 1, axis=1)
    return gradient


def equations(jaxpr, repeated: int = 1):
    """Every equation of a program on this platform, and how often it runs."""
    for eqn in jaxpr.eqns:
        yield repeated, eqn
        times = repeated * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        inner = list(jax.extend.core.jaxprs_in_params(eqn.params))
        # The last branch is for all platforms that have no branch of their own.
        for jaxpr_inside in inner[-1:] if eqn.params.get("branches_platforms") else inner:
            yield from equations(jaxpr_inside, times)


def program_flops(jaxpr) -> int:
    """FLOPs of every product and convolution in a program."""
    flops = 0
    for times, eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            _, *summed = eqn.params["dimension_numbers"].rhs_spec
            inner = math.prod(eqn.invars[1].aval.shape[axis] for axis in summed)
        else:
            continue
        flops += times * 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    return flops


def loss_flops(
    config: TokenBridgeConfig, hidden: int, head_fraction: float = 1.0
) -> tuple[int, jax.stages.Lowered]:
    """FLOPs of every product in the program of one image's loss, and that program."""
    draw = MaskDraw(jnp.int32(hidden), hidden, config.positions - hidden)

    def run(params, batch):
        return training_loss(config, params, batch, draw, head_fraction=head_fraction)

    traced = jax.jit(run).trace(abstract_params(config), examples(random_batch(config, 1)))
    return program_flops(traced.jaxpr.jaxpr), traced.lower()


def bfloat16_sums(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The sums of more than two numbers that a function's gradient computes in bfloat16.

    The sums of products are left out: accelerators compute them in float32.
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


def visible_tokens(kind: str, images: int, length: int) -> jax.Array | None:
    """A mask in which every image has visible tokens, the last one at least."""
    if kind == "all":
        return None
    shape = (1 if kind == "same" else images, length)
    return jnp.asarray(np.random.default_rng(9).random(shape) < 0.4).at[:, -1].set(True)


@functools.partial(jax.jit, static_argnums=5)
def positions_plain(qkv, bias, visible, seed, d_out, dropout):
    """Output and gradient of the plain attention over positions."""
    out, backward = jax.vjp(lambda x: attend_plainly(x, bias, visible, seed, dropout), qkv)
    return out, backward(d_out)[0]


def attend_plainly(qkv, bias, visible, seed, dropout):
    """Plain attention over positions, of queries, keys and values and their bias."""
    q, k, v = ((qkv + bias[None, None])[:, :, part] for part in range(3))
    return plain_attention(q, k, v, None if visible is None else visible[:, None], seed, dropout)
