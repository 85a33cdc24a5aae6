"""The attention kernels for TPUs, run as Python on the CPU, against the plain version."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from scipy import special
from tiny_model import (
    normal,
    on_mesh,
    positions_plain,
    relative_error,
    shard_shapes,
    visible_tokens,
)

from tokenbridge_jax.ops import tpu_attention, tpu_channel_attention
from tokenbridge_jax.ops.attention import attend
from tokenbridge_jax.ops.channel_attention import attend_channels, plain_channel_attention
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.transformer import Attention

SEED = jnp.array([123, 456], jnp.uint32)


@functools.partial(jax.jit, static_argnums=5)
def kernels(qkv, bias, visible, seed, d_out, rate):
    """Output, normalizer and gradient, by the kernels."""
    settings = dict(rate=rate, interpret=True)
    out, normalizer = tpu_attention.forward(qkv, bias, visible, seed, **settings)
    d_qkv = tpu_attention.backward(qkv, bias, visible, seed, normalizer, d_out, **settings)
    return out, normalizer, d_qkv


def arrays(images, length, heads, width, dtype=jnp.float32):
    """Queries, keys and values, their bias, and a gradient of the output."""
    qkv, d_out = (images, length, 3, heads, width), (images, length, heads, width)
    numbers = 2 * normal(0, *qkv), normal(1, 3, heads, width), normal(2, *d_out)
    return tuple(x.astype(dtype) for x in numbers)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 2e-5), (jnp.bfloat16, 0.015)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(
    ("images", "length", "heads", "width", "kind"),
    [
        (2, 16, 4, 64, "all"),
        (3, 11, 2, 64, "each"),
        (2, 133, 2, 64, "same"),
        (1, 9, 8, 80, "each"),  # Heads that share registers with two others.
        (2, 7, 3, 128, "all"),
    ],
)
def test_kernels_agree_with_plain_attention(
    images: int, length: int, heads: int, width: int, kind: str, rate: float, dtype, tolerance
):
    qkv, bias, d_out = arrays(images, length, heads, width, dtype)
    visible = visible_tokens(kind, images, length)
    out, normalizer, d_qkv = kernels(qkv, bias, visible, SEED, d_out, rate)
    expected, expected_d_qkv = positions_plain(qkv, bias, visible, SEED, d_out, rate)
    assert out.dtype == d_qkv.dtype == dtype
    assert relative_error(out, expected) < tolerance
    for part in range(3):
        assert relative_error(d_qkv[:, :, part], expected_d_qkv[:, :, part]) < tolerance

    q, k, _ = np.moveaxis(np.asarray(qkv + bias[None, None], np.float64), 2, 0)
    scores = np.einsum("nqhk,nshk->nhqs", q, k) / np.sqrt(width)
    if visible is not None:
        scores = np.where(np.asarray(visible)[:, None, None], scores, -np.inf)
    np.testing.assert_allclose(normalizer, special.logsumexp(scores, axis=-1), atol=1e-4)


def test_no_score_is_too_large():
    """exp of scores of some hundreds would overflow."""
    qkv, bias, d_out = arrays(1, 8, 2, 64)
    out, _, d_qkv = kernels(6 * qkv, bias, None, SEED, d_out, 0.0)
    expected, expected_d_qkv = positions_plain(6 * qkv, bias, None, SEED, d_out, 0.0)
    assert relative_error(out, expected) < 1e-4
    assert relative_error(d_qkv, expected_d_qkv) < 1e-3


@pytest.mark.parametrize(
    ("images", "heads", "width", "kind"),
    [(8, 4, 64, "same"), (4, 4, 64, "each"), (4, 3, 128, "all"), (3, 4, 64, "each")],
)
def test_kernels_are_the_same_on_any_mesh(images: int, heads: int, width: int, kind: str):
    """With dropout, also where the mesh does not divide batch or heads."""
    batch = ("data", "fsdp") if images % 4 == 0 else None
    tensor = "tensor" if heads == 4 else None
    qkv, bias, d_out = arrays(images, 6, heads, width)
    visible = visible_tokens(kind, images, 6)
    arguments = qkv, bias, visible, SEED, d_out
    of_visible = (batch,) if kind == "each" else ()
    layouts = (batch, None, None, tensor), (None, tensor), of_visible, (), (batch, None, tensor)
    expected = kernels(*arguments, 0.2)
    actual = on_mesh(lambda *x: kernels(*x, 0.2), *zip(arguments, layouts, strict=True))
    for mine, other in zip(actual, expected, strict=True):
        assert relative_error(mine, other) < 2e-6
    share = (images // (4 if batch else 1), 6, heads // (2 if tensor else 1), width)
    assert shard_shapes(actual[0]) == {share}


def kernels_of(traced: jax.stages.Traced) -> dict[str, int]:
    """How many kernels a program runs on each platform."""
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu")}
    return {platform: text.count("tpu_custom_call") for platform, text in texts.items()}


@pytest.mark.parametrize(
    ("shape", "dtype", "count"),
    [
        ((8, 6, 3, 2, 64), jnp.bfloat16, 2),
        ((8, 6, 3, 8, 80), jnp.bfloat16, 2),
        ((8, 6, 3, 2, 64), jnp.float32, 0),
        ((8, 6, 3, 3, 64), jnp.bfloat16, 0),
        ((8, 6, 3, 2, 24), jnp.bfloat16, 0),
        ((1, 600, 3, 2, 64), jnp.bfloat16, 0),
    ],
)
def test_tpus_run_one_kernel_forward_and_one_backward(shape, dtype, count: int):
    def total(qkv, bias):
        return jnp.sum(attend(qkv, bias, None, SEED, 0.1).astype(jnp.float32))

    qkv, bias = (jax.ShapeDtypeStruct(x, dtype) for x in (shape, shape[2:]))
    assert kernels_of(jax.jit(jax.grad(total)).trace(qkv, bias)) == {"tpu": count, "cpu": 0}


def test_heads_of_a_device_that_do_not_fill_registers_use_no_kernel():
    """Two heads of width 64 fill registers; a mesh that splits them leaves one."""

    def count(qkv, bias):
        traced = jax.jit(lambda *x: attend(*x, None, SEED, 0.1)).trace(qkv, bias)
        counted.append(kernels_of(traced)["tpu"])
        return qkv

    counted: list[int] = []
    for heads in (2, 4):
        qkv, bias, _ = arrays(4, 6, heads, 64, jnp.bfloat16)
        on_mesh(count, (qkv, ()), (bias, ()))
    assert counted[0] == 0
    assert counted[-1] == 1


def test_a_layer_is_the_same_with_heads_joined():
    """Against the definition from the parameters, whose shapes stay those of separate heads."""
    x = normal(0, 2, 5, 12)
    layer = Attention(heads=3)
    params = meta.unbox(layer.init(jax.random.key(0), x))["params"]
    assert params["qkv"]["kernel"].shape == (12, 3, 3, 4)
    assert params["proj"]["kernel"].shape == (3, 4, 12)
    q, k, v = np.moveaxis(np.einsum("ntd,dphk->ntphk", x, params["qkv"]["kernel"]), 2, 0)
    weights = special.softmax(np.einsum("nqhk,nshk->nhqs", q, k) / 2, axis=-1)
    mixed = np.einsum("nhqs,nshk->nqhk", weights, v)
    expected = np.einsum("nqhk,hkd->nqd", mixed, params["proj"]["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


# --- The head's attention over channels -----------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(5, 6))
def channel_kernels(qkv, bias, norms, seed, d_out, rate, causal=True):
    """Output and gradients, by the kernels."""
    settings = dict(rate=rate, causal=causal, interpret=True)
    out = tpu_channel_attention.forward(qkv, bias, norms, seed, **settings)
    gradients = tpu_channel_attention.backward(qkv, bias, norms, seed, d_out, **settings)
    return out, *gradients


def plain_channels(qkv, bias, norms, seed, d_out, rate, causal):
    def run(qkv, norms):
        return plain_channel_attention(qkv, bias, norms, seed, rate, causal)

    out, gradients = jax.vjp(run, qkv, norms)
    return out, *gradients(d_out)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(("rate", "causal"), [(0.0, False), (0.2, True)])
@pytest.mark.parametrize(
    ("positions", "channels", "heads", "width"),
    [
        (8, 16, 2, 64),
        (11, 16, 2, 64),  # The second program has three positions of eight.
        (3, 4, 8, 80),  # Heads that share registers with two others.
        (1, 8, 1, 128),
    ],
)
def test_kernels_of_channels_agree_with_the_plain_version(
    positions: int,
    channels: int,
    heads: int,
    width: int,
    rate: float,
    causal: bool,
    dtype,
    tolerance: float,
):
    qkv, bias, d_out = arrays(positions, channels, heads, width, dtype)
    arguments = qkv, bias, normal(3, 4, width), SEED, d_out, rate, causal
    actual, expected = channel_kernels(*arguments), plain_channels(*arguments)
    for mine, other in zip(actual, expected, strict=True):
        assert mine.dtype == other.dtype
        assert relative_error(mine, other) < tolerance


@pytest.mark.parametrize(("positions", "heads"), [(16, 4), (8, 3), (6, 2)])
def test_kernels_of_channels_are_the_same_on_any_mesh(positions: int, heads: int):
    """With dropout, also where the mesh does not divide positions or heads."""
    width = 64 if heads == 4 else 128
    qkv, bias, d_out = arrays(positions, 4, heads, width)
    arguments = qkv, bias, normal(3, 4, width), SEED, d_out
    expected = channel_kernels(*arguments, 0.2)
    actual = on_mesh(lambda *x: channel_kernels(*x, 0.2), *((x, ()) for x in arguments))
    for mine, other in zip(actual, expected, strict=True):
        assert relative_error(mine, other) < 2e-6
    share = (
        positions // (4 if positions % 4 == 0 else 1),
        4,
        heads // (1 + (heads % 2 == 0)),
        width,
    )
    assert shard_shapes(actual[0]) == {share}


def test_every_device_may_run_the_kernels_by_itself():
    """As in the loss: draws, outputs and gradients are those of one device."""
    qkv, bias, d_out = arrays(16, 4, 2, 64)
    arguments = qkv, bias, normal(3, 4, 64), SEED, d_out

    def run(*arguments):
        out, d_qkv, d_norms = channel_kernels(*arguments, 0.2)
        return out, d_qkv, meshes.sum_over_shards(d_norms)

    alone = jax.jit(meshes.on_batch_shards(run, (0, -1, -1, -1, 0), (0, 0, -1)))
    actual = on_mesh(alone, *((x, ()) for x in arguments), sizes=(4, 2, 1))
    for mine, other in zip(actual, channel_kernels(*arguments, 0.2), strict=True):
        assert relative_error(mine, other) < 2e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "count"),
    [
        ((8, 16, 3, 2, 64), jnp.bfloat16, 2),
        ((8, 16, 3, 8, 80), jnp.bfloat16, 2),
        ((8, 16, 3, 2, 64), jnp.float32, 0),
        ((8, 16, 3, 3, 64), jnp.bfloat16, 0),
        ((8, 12, 3, 2, 64), jnp.bfloat16, 0),
    ],
)
def test_tpus_run_one_kernel_of_channels_each_way(shape, dtype, count: int):
    def total(qkv, bias):
        out = attend_channels(qkv, bias, jnp.ones((4, shape[-1])), SEED, 0.1, True)
        return jnp.sum(out.astype(jnp.float32))

    qkv, bias = (jax.ShapeDtypeStruct(x, dtype) for x in (shape, shape[2:]))
    traced = jax.jit(jax.value_and_grad(total)).trace(qkv, bias)
    assert kernels_of(traced) == {"tpu": count, "cpu": 0}
