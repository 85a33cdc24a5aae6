"""The attention kernels, run as Python on the CPU, against the plain versions and formulas."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from tiny_model import (
    attend_plainly,
    normal,
    on_mesh,
    positions_plain,
    relative_error,
    shard_shapes,
    triton_kernels,
    visible_tokens,
)

from tokenbridge_jax.ops import attention as over_positions
from tokenbridge_jax.ops import channel_attention as over_channels
from tokenbridge_jax.ops import pallas
from tokenbridge_jax.ops.attention import attend
from tokenbridge_jax.ops.channel_attention import attend_channels, plain_channel_attention
from tokenbridge_jax.runtime import meshes

SEED = jnp.array([123, 456], jnp.uint32)
BLOCK, TILE = over_positions.BLOCK, over_channels.TILE


@functools.partial(jax.jit, static_argnums=5)
def positions_kernel(qkv, bias, visible, seed, d_out, dropout):
    """Output, normalizer and gradient of the attention over positions, by its kernels."""
    settings = dict(rate=dropout, interpret=True)
    inputs = qkv, bias, visible, seed
    out = over_positions.kernel_forward(*inputs, **settings)
    return *out, over_positions.kernel_backward(*inputs, *out, d_out, **settings)


@functools.partial(jax.jit, static_argnums=(5, 6))
def channels_kernel(qkv, bias, norms, seed, d_out, dropout, causal=True):
    """Output and gradients of the attention over channels, by its kernels."""
    settings = dict(rate=dropout, causal=causal, interpret=True)
    out = over_channels.kernel_forward(qkv, bias, norms, seed, **settings)
    return out, *over_channels.kernel_backward(qkv, bias, norms, seed, d_out, **settings)


@functools.partial(jax.jit, static_argnums=(5, 6))
def channels_plain(qkv, bias, norms, seed, d_out, dropout, causal):
    """Output and gradients of the plain attention over channels."""
    out, backward = jax.vjp(
        lambda qkv, norms: plain_channel_attention(qkv, bias, norms, seed, dropout, causal),
        qkv,
        norms,
    )
    return out, *backward(d_out)


# --- The plain versions ---------------------------------------------------------------------------


def softmax_by_hand(q, k, v, seen):
    """Attention of one head of one sequence in float64, row by row."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows = [
        special.softmax(k[seen[t]] @ q[t] / np.sqrt(q.shape[1])) @ v[seen[t]] for t in range(len(q))
    ]
    return np.stack(rows)


@pytest.mark.parametrize("kind", ["all", "same", "each"])
def test_attention_is_a_softmax_over_what_is_visible(kind: str):
    qkv, bias = normal(0, 2, 5, 3, 3, 4), normal(1, 3, 3, 4)
    visible = visible_tokens(kind, 2, 5)
    out = np.asarray(attend(qkv, bias, visible, SEED, 0.0))
    seen = np.ones((2, 5), bool) if visible is None else np.broadcast_to(visible, (2, 5))
    for image in range(2):
        for head in range(3):
            q, k, v = np.asarray(qkv + bias[None, None])[image, :, :, head].swapaxes(0, 1)
            expected = softmax_by_hand(q, k, v, np.tile(seen[image], (5, 1)))
            np.testing.assert_allclose(out[image, :, head], expected, rtol=1e-5, atol=1e-6)


def test_channel_attention_is_causal_and_normalizes_queries_and_keys():
    qkv, bias, norms = 3 * normal(0, 2, 4, 3, 3, 6) + 1, normal(1, 3, 3, 6), normal(2, 4, 6)
    out = np.asarray(attend_channels(qkv, bias, norms, SEED, 0.0, True))
    q, k, v = np.moveaxis(np.asarray(qkv + bias[None, None], np.float64), 2, 0)
    scale_q, bias_q, scale_k, bias_k = np.asarray(norms, np.float64)

    def layer_norm(x, scale, bias):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale + bias

    q, k = layer_norm(q, scale_q, bias_q), layer_norm(k, scale_k, bias_k)
    for n in range(2):
        for head in range(3):
            parts = (x[n, :, head] for x in (q, k, v))
            expected = softmax_by_hand(*parts, np.tri(4, dtype=bool))
            np.testing.assert_allclose(out[n, :, head], expected, rtol=1e-4, atol=1e-5)


def test_dropped_weights_are_dropped_after_the_softmax():
    """With values that count keys one by one, the output is the weights."""
    length = 6
    qk = normal(0, 3, length, 2, 2, length)
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None, None], (3, length, 1, 2, length))
    qkv = jnp.concatenate([qk, v], axis=2)
    nothing = jnp.zeros((3, 2, length))
    weights, dropped = (attend(qkv, nothing, None, SEED, rate) for rate in (0.0, 0.25))
    kept = np.asarray(dropped) != 0
    assert 0.6 < kept.mean() < 0.9
    np.testing.assert_allclose(dropped, np.where(kept, np.asarray(weights) / 0.75, 0), rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "heads", "kind"), [(8, 4, "same"), (4, 2, "each"), (4, 3, "all"), (3, 2, "each")]
)
def test_image_by_image_is_equal_to_all_at_once(images: int, heads: int, kind: str):
    """On one device and on a mesh, also where the mesh does not divide batch or heads."""
    qkv, bias = normal(0, images, 6, 3, heads, 8), normal(2, 3, heads, 8)
    visible = visible_tokens(kind, images, 6)
    arguments = qkv, bias, visible, SEED
    expected = attend_plainly(*arguments, 0.0)
    run = jax.jit(over_positions.image_by_image)
    assert relative_error(run(*arguments), expected) < 1e-6
    several = on_mesh(run, *((argument, ()) for argument in arguments))
    assert relative_error(several, expected) < 1e-6
    share = (images // (4 if images % 4 == 0 else 1), 6, heads // (2 if heads % 2 == 0 else 1), 8)
    assert shard_shapes(several) == {share}


# --- The kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("images", "length", "heads", "width", "kind"),
    [
        (2, 7, 3, 20, "all"),
        (2, BLOCK, 1, 16, "same"),
        (2, BLOCK + 6, 2, 16, "each"),
        (1, 2 * BLOCK + 1, 2, 24, "each"),
        (3, 3 * BLOCK - 1, 1, 5, "all"),
    ],
)
def test_attention_kernels_agree_with_plain_attention(
    images: int, length: int, heads: int, width: int, kind: str, dropout: float
):
    qkv, bias = 2 * normal(0, images, length, 3, heads, width), normal(2, 3, heads, width)
    d_out = normal(1, images, length, heads, width)
    visible = visible_tokens(kind, images, length)
    out, normalizer, d_qkv = positions_kernel(qkv, bias, visible, SEED, d_out, dropout)
    expected, expected_d_qkv = positions_plain(qkv, bias, visible, SEED, d_out, dropout)
    assert relative_error(out, expected) < 3e-6
    for part in range(3):
        assert relative_error(d_qkv[:, :, part], expected_d_qkv[:, :, part]) < 2e-5

    q, k, _ = np.moveaxis(np.asarray(qkv + bias[None, None], np.float64), 2, 0)
    scores = np.einsum("nqhk,nshk->nhqs", q, k) / np.sqrt(width)
    if visible is not None:
        scores = np.where(np.asarray(visible)[:, None, None], scores, -np.inf)
    np.testing.assert_allclose(normalizer, special.logsumexp(scores, axis=-1), rtol=1e-5, atol=1e-5)


def test_rows_that_pad_a_tile_do_not_change_gradients():
    """Such rows contain only the bias; here exp of their scores would overflow."""
    qkv, bias = normal(0, 1, 7, 3, 1, 16), 6 * jnp.ones((3, 1, 16))
    d_out = normal(1, 1, 7, 1, 16)
    actual = positions_kernel(qkv, bias, None, SEED, d_out, 0.0)[2]
    assert relative_error(actual, positions_plain(qkv, bias, None, SEED, d_out, 0.0)[1]) < 1e-4


@pytest.mark.parametrize(("dropout", "causal"), [(0.0, False), (0.2, True)])
@pytest.mark.parametrize(
    ("count", "channels", "heads", "width"),
    [
        (TILE // 4, 4, 2, 16),  # One full tile.
        (3, 4, 3, 20),  # Less than a tile.
        (7, 16, 1, 24),  # The last tile is half full.
        (4, 16, 2, 5),
        (2, TILE, 1, 16),
        (6, 6, 2, 16),  # Two rows of a tile stay empty, and the last one holds one sequence.
        (3, 20, 2, 16),
    ],
)
def test_channel_attention_kernels_agree_with_plain_channel_attention(
    count: int, channels: int, heads: int, width: int, dropout: float, causal: bool
):
    qkv = 2 * normal(0, count, channels, 3, heads, width) + 0.5
    bias, norms = normal(1, 3, heads, width), normal(2, 4, width)
    d_out = normal(3, count, channels, heads, width)
    arguments = qkv, bias, norms, SEED, d_out, dropout, causal
    actual, (out, d_qkv, d_norms) = channels_kernel(*arguments), channels_plain(*arguments)
    assert relative_error(actual[0], out) < 3e-6
    for part in range(3):
        assert relative_error(actual[1][:, :, part], d_qkv[:, :, part]) < 2e-5
    # In exact arithmetic, the gradient of the bias of the keys' norm is zero.
    assert relative_error(actual[2][:3], d_norms[:3]) < 2e-5
    assert np.max(np.abs(actual[2][3])) < 1e-5 * np.max(np.abs(d_norms))


# --- On several devices ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "count", "heads", "kind"),
    [
        (positions_kernel, 8, 4, "same"),
        (positions_kernel, 4, 2, "each"),
        (positions_kernel, 4, 3, "all"),
        (positions_kernel, 3, 2, "each"),
        (channels_kernel, 16, 4, ""),
        (channels_kernel, 8, 3, ""),
        (channels_kernel, 6, 2, ""),
    ],
)
def test_kernels_are_the_same_on_any_mesh(kernel, count: int, heads: int, kind: str):
    """With dropout, also where the mesh does not divide batch or heads."""
    over_positions, length = kernel is positions_kernel, 6 if kind else 4
    batch = ("data", "fsdp") if count % 4 == 0 else None
    tensor = "tensor" if heads % 2 == 0 else None
    qkv, d_out = normal(0, count, length, 3, heads, 16), normal(1, count, length, heads, 16)
    third = visible_tokens(kind, count, length) if over_positions else normal(3, 4, 16)
    arguments = qkv, normal(2, 3, heads, 16), third, SEED, d_out
    of_third = (batch,) if kind == "each" else ()
    layouts = (batch, None, None, tensor), (None, tensor), of_third, (), (batch, None, tensor)
    expected = kernel(*arguments, 0.2)
    actual = on_mesh(lambda *x: kernel(*x, 0.2), *zip(arguments, layouts, strict=True))
    for mine, other in zip(actual, expected, strict=True):
        assert relative_error(mine, other) < (1e-6 if over_positions else 2e-6)
    if batch:  # Also if every device runs the function by itself.
        third_axis = 0 if kind == "each" else -1
        axes = (0, -1, third_axis, -1, 0)
        of_results = [0, 0, 0 if over_positions else -1]  # The gradient of the norms is a sum.

        def on_shard(*x):
            results = kernel(*x, 0.2)
            return [
                meshes.sum_over_shards(x) if axis < 0 else x
                for axis, x in zip(of_results, results, strict=True)
            ]

        run = meshes.on_batch_shards(on_shard, axes, of_results)
        alone = on_mesh(jax.jit(run), *((x, ()) for x in arguments))
        for mine, other in zip(alone, expected, strict=True):
            assert relative_error(mine, other) < 2e-6
    # Each result is split over its axis of heads; the gradient of the norms has no such axis.
    for mine, axis in zip(actual, (2, 1, 3) if over_positions else (2, 3), strict=False):
        share = list(mine.shape)
        share[0] //= 4 if batch else 1
        share[axis] //= 2 if tensor else 1
        assert shard_shapes(mine) == {tuple(share)}


# --- Platforms with and without kernels -----------------------------------------------------------

NORMS, VISIBLE = normal(1, 4, 16), jnp.array([[True, False, True, True]])
# The functions that the model calls, and their plain versions.
FUNCTIONS = {
    "positions": (
        lambda qkv, bias: attend(qkv, bias, VISIBLE, SEED, 0.2),
        lambda qkv, bias: attend_plainly(qkv, bias, VISIBLE, SEED, 0.2),
    ),
    "channels": (
        lambda qkv, bias: attend_channels(qkv, bias, NORMS, SEED, 0.2, True),
        lambda qkv, bias: plain_channel_attention(qkv, bias, NORMS, SEED, 0.2, True),
    ),
}


def gradients_and_output(function):
    """The output, and gradients with respect to queries, keys and values and to their bias."""

    def total(qkv, bias):
        out = function(qkv, bias)
        return jnp.sum(jnp.square(out.astype(jnp.float32))), out

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


def inputs(dtype, channels=4, width=16):
    shape = (3, 2, width)
    return normal(0, 8, channels, *shape, dtype=dtype), normal(1, *shape, dtype=dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.01)])
def test_other_platforms_run_the_plain_versions(name: str, dtype, tolerance: float):
    actual, expected = (gradients_and_output(f)(*inputs(dtype)) for f in FUNCTIONS[name])
    for mine, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert mine.dtype == other.dtype == dtype
        assert relative_error(mine, other) < tolerance


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.usefixtures("gpu_to_lower_for")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "kernels"), [(jnp.bfloat16, 2), (jnp.float32, 0)])
def test_gpus_run_one_kernel_forward_and_one_backward(name: str, dtype, kernels: int):
    traced = gradients_and_output(FUNCTIONS[name][0]).trace(*inputs(dtype))
    assert triton_kernels(traced) == {"cuda": kernels, "cpu": 0, "tpu": 0}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.usefixtures("gpu_to_lower_for")
def test_channels_that_do_not_divide_a_tile_use_the_kernels():
    traced = gradients_and_output(FUNCTIONS["channels"][0]).trace(*inputs(jnp.bfloat16, 6))
    assert triton_kernels(traced)["cuda"] == 2


@pytest.mark.parametrize(("channels", "width"), [(TILE + 1, 16), (4, 8)])
def test_shapes_that_do_not_fit_a_tile_use_no_kernel(channels: int, width: int):
    norms = normal(1, 4, width)
    run = gradients_and_output(lambda *x: attend_channels(*x, norms, SEED, 0.2, True))
    assert triton_kernels(run.trace(*inputs(jnp.bfloat16, channels, width)))["cuda"] == 0


WITHOUT_BACKEND = """
import sys
platform, backend = sys.argv[1:]
sys.modules[f"jax.experimental.pallas.{backend}"] = None
import jax, jax.numpy as jnp
import tokenbridge_jax.commands.train, tokenbridge_jax.commands.sample
from tokenbridge_jax.ops.attention import attend
from tokenbridge_jax.ops.gelu import gelu_dropout
def function(qkv, bias, seed):
    mixed = attend(qkv, bias, None, seed, 0.1)
    return mixed, gelu_dropout(mixed[:, :, 0], bias[0, 0], seed, 0.1)
seed = jnp.zeros(2, jnp.uint32)
shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 64, 3, 2, 64), (3, 2, 64))]
traced = jax.jit(function).trace(*shapes, seed)
text = traced.lower(lowering_platforms=(platform,)).as_text()
assert "triton" not in text
assert "tpu_custom_call" not in text
if platform == "cuda":  # TPUs keep theirs.
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
"""


@pytest.mark.parametrize(("platform", "backend"), [("cuda", "triton"), ("tpu", "tpu")])
def test_without_a_backend_of_pallas_plain_operations_are_used(platform: str, backend: str):
    """JAX plans to remove Triton. Without it nothing fails, and one line on stderr says so."""
    command = [sys.executable, "-c", WITHOUT_BACKEND, platform, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (told,) = (line for line in done.stderr.splitlines() if "fast kernels" in line)
    assert "plain operations take their place" in told


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("rocm 60300", "gfx942", "card X is from AMD, they are for NVIDIA)"),
        ("cuda 12090", "7.5", "card X is 7.5, they need 8.0)"),
    ],
)
def test_cards_without_kernels_are_named_once(version, capability, reason, monkeypatch, capsys):
    client = types.SimpleNamespace(platform_version=version)
    card = types.SimpleNamespace(device_kind="card X", compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pallas, "_given_up", {})
    monkeypatch.setattr(pallas, "_try_gpu", functools.cache(pallas._try_gpu.__wrapped__))
    assert [pallas._kernels_work("cuda") for _ in range(2)] == [False, False]
    (told,) = capsys.readouterr().err.splitlines()
    assert "plain operations take their place" in told
    assert told.endswith(reason)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_after_a_kernel_cannot_be_built_no_kernel_is_used(name: str, monkeypatch, capsys):
    def changed(*arguments, **others):
        raise TypeError("pallas_call() takes\nsomething else now")

    monkeypatch.setattr(pallas, "_given_up", {})
    monkeypatch.setattr(pallas.pl, "pallas_call", changed)
    for _ in range(2):
        traced = gradients_and_output(FUNCTIONS[name][0]).trace(*inputs(jnp.bfloat16))
        assert triton_kernels(traced)["cuda"] == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].endswith("TypeError: pallas_call() takes something else now)")
