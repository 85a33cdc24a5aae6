"""The autoencoder, its name table and its files."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from goldens_autoencoder import read_autoencoder_golden
from tiny_model import bfloat16_sums

from tokenbridge_jax.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Posterior,
    abstract_params,
    autoencoder_hash,
    images_to_float,
    images_to_uint8,
    init_params,
    load_autoencoder,
    save_autoencoder,
)
from tokenbridge_jax.layers import GroupNorm
from tokenbridge_jax.runtime import safetensors_file
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.meshes import logical_shardings, make_mesh
from tokenbridge_jax.torch_bridge.ldm import table
from tokenbridge_jax.torch_bridge.table import Entry, from_torch, to_torch

GOLDEN = Path(__file__).parent / "goldens" / "kl_vae_tiny.npz"
TINY = AutoencoderConfig(
    image_size=8,
    image_channels=1,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(4,),
    latent_channels=4,
)


def parameter_count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(tree)))


def test_kl16_has_the_published_parameters():
    config = AutoencoderConfig.kl16()
    params = nn.unbox(abstract_params(config))
    assert parameter_count(params) == 66_456_019
    assert (config.downsampling, config.grid, config.positions) == (16, 16, 256)

    leaves = traverse_util.flatten_dict(params, sep=".")
    entries = table(config)
    assert {entry.path for entry in entries} == set(leaves)
    assert len(entries) == 312
    shapes = {e.torch_name: e.expected_shape(leaves[e.path].shape) for e in entries}
    assert shapes["encoder.down.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.3.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (TINY, 4),
        (dataclasses.replace(TINY, multipliers=(1,), latent_channels=64), 8),
        (dataclasses.replace(TINY, multipliers=(1, 1, 2, 2), blocks=3, image_channels=3), 1),
        (dataclasses.replace(TINY, channels=64, attention_resolutions=()), 4),
        (dataclasses.replace(TINY, image_size=32, attention_resolutions=(32, 16)), 16),
    ],
)
def test_family(config: AutoencoderConfig, grid: int):
    params = nn.unbox(abstract_params(config))
    leaves = traverse_util.flatten_dict(params, sep=".")
    assert {entry.path for entry in table(config)} == set(leaves)
    images = jax.ShapeDtypeStruct(
        (2, config.image_size, config.image_size, config.image_channels), jnp.float32
    )
    module = Autoencoder(config)
    decoded, posterior = jax.eval_shape(
        lambda p, x: module.apply({"params": p}, x, jax.random.key(0)), params, images
    )
    assert posterior.mean.shape == (2, grid, grid, config.latent_channels)
    assert decoded.shape == images.shape


@pytest.mark.parametrize("name", ["multipliers", "attention_resolutions"])
@pytest.mark.parametrize("values", [("",), ("1", "2"), ("1,2",), (1, 1.5), (1, None)])
def test_lists_must_contain_whole_numbers(name, values):
    with pytest.raises(UserError, match=rf"{name} .* whole numbers, such as --config.*{name}=1,2"):
        AutoencoderConfig.from_json(TINY.to_json() | {name: values})


def test_other_image_sizes_than_the_nominal_one():
    module, params = Autoencoder(TINY), nn.unbox(abstract_params(TINY))
    posterior = jax.eval_shape(
        lambda p, x: module.apply({"params": p}, x, method="encode"),
        params,
        jnp.zeros((1, 12, 6, 1)),
    )
    assert posterior.mean.shape == (1, 6, 3, 4)
    with pytest.raises(UserError, match="9x8 is not divisible"):
        module.apply({"params": {}}, jnp.zeros((1, 9, 8, 1)), method="encode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "not divisible"),
        ({"channels": 33}, "multiple of 32"),
        ({"multipliers": (1, 0)}, "positive"),
        ({"multipliers": ()}, "positive"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_initial_outputs_have_sensible_size():
    params = init_params(TINY, jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1), minval=-1.0)
    apply = jax.jit(Autoencoder(TINY).apply)
    decoded, posterior = apply({"params": params}, images, jax.random.key(2))
    for array in (decoded, posterior.mean, posterior.logvar):
        assert 0.1 < float(jnp.std(array)) < 5


def test_initial_parameters():
    params = traverse_util.flatten_dict(init_params(TINY, jax.random.key(0)))
    shapes = traverse_util.flatten_dict(nn.unbox(abstract_params(TINY)))
    assert {p: (a.shape, a.dtype) for p, a in params.items()} == {
        p: (a.shape, a.dtype) for p, a in shapes.items()
    }
    for path, array in params.items():
        if path[-1] == "kernel":
            scaled = np.asarray(array) * np.sqrt(np.prod(array.shape[:-1]))
            spread = 4.5 / np.sqrt(array.size)
            assert abs(scaled.mean()) < spread, path
            assert abs(scaled.std() - 1) < spread, path
        else:
            np.testing.assert_array_equal(array, float(path[-1] == "scale"))
    first = params["encoder", "conv_in", "kernel"]
    other = init_params(TINY, jax.random.key(1))["encoder"]["conv_in"]["kernel"]
    assert not np.array_equal(first, other)


def test_every_convolution_is_laid_out_by_the_mesh():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shardings = traverse_util.flatten_dict(logical_shardings(abstract_params(TINY), mesh))
    split = {path for path, sharding in shardings.items() if "fsdp" in sharding.spec}
    kernels = {path for path in shardings if path[-1] == "kernel"}
    assert kernels - split == {("decoder", "conv_out", "kernel")}  # one output channel
    assert split <= kernels


def test_bfloat16_agrees_to_its_accuracy():
    config, params, golden = read_autoencoder_golden(GOLDEN)
    images = golden["in/images_nchw"].transpose(0, 2, 3, 1)
    module = Autoencoder(config, "bfloat16")
    posterior = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(
        params, images
    )
    expected = golden["out/mean"].transpose(0, 2, 3, 1)
    assert posterior.mean.dtype == jnp.float32
    error = np.abs(np.asarray(posterior.mean) - expected)
    assert 1e-5 < error.max() / np.abs(expected).max() < 0.05
    assert np.sqrt(np.mean(error**2)) / np.std(expected) < 0.02


def test_gradients_of_bfloat16_add_up_in_float32():
    images = jnp.zeros((3, 8, 8, 1))

    def error(params):
        arguments = {"params": params}, images, jax.random.key(0)
        return jnp.mean(jnp.square(Autoencoder(TINY, "bfloat16").apply(*arguments)[0] - images))

    assert bfloat16_sums(error, nn.unbox(abstract_params(TINY))) == []


def test_group_normalisation_around_an_outlier_in_the_middle():
    """Sums are of differences from the middle pixel; rounding must not make a variance negative."""
    x = np.full((1, 32, 32, 32), 0.1, np.float32)
    x[:, 16, 16] = 3e4
    params = {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}
    found = np.asarray(jax.jit(GroupNorm().apply)({"params": params}, x))
    assert np.isfinite(found).all()
    assert found[0, 16, 16, 0] == pytest.approx(32, rel=1e-2)


def test_group_normalisation():
    rng = np.random.default_rng(0)
    # A mean of a thousand standard deviations, and channels that differ within a group.
    x = rng.normal(size=(2, 9, 16, 64)) + 1000.0 + rng.normal(size=64)
    x = np.asarray(x, np.float32)
    params = {name: rng.normal(size=64).astype(np.float32) for name in ("scale", "bias")}
    grouped = x.astype(np.float64).reshape(2, 9, 16, 32, 2)
    centred = grouped - grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = np.square(centred).mean(axis=(1, 2, 4), keepdims=True)
    expected = (centred / np.sqrt(variance + 1e-6)).reshape(x.shape)
    expected = expected * params["scale"] + params["bias"]
    found = jax.jit(GroupNorm().apply)({"params": params}, x)
    np.testing.assert_allclose(found, expected, atol=1000 * 2**-20)

    def gradient(module, x):
        """Of a sum with different weights everywhere."""
        weights = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return jax.grad(lambda x: jnp.sum(weights * module.apply({"params": params}, x)))(x)

    x = jnp.asarray(x) - 1000
    library = nn.GroupNorm(32, epsilon=1e-6, use_fast_variance=False)
    with jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(lambda x: gradient(library, x))(x)
    np.testing.assert_allclose(jax.jit(lambda x: gradient(GroupNorm(), x))(x), theirs, atol=1e-5)


def test_posterior():
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(3, 2, 2, 8)).astype(np.float32)
    moments[0, 0, 0, 4:6] = -100, 100
    posterior = Posterior.from_moments(jnp.asarray(moments))
    np.testing.assert_array_equal(posterior.mean, moments[..., :4])
    np.testing.assert_array_equal(posterior.logvar[0, 0, 0, :2], [-30, 20])

    keys = jax.random.split(jax.random.key(0), 4000)
    samples = np.asarray(jax.vmap(posterior.sample)(keys))[:, 1:]
    variance = np.exp(moments[1:, ..., 4:])
    np.testing.assert_allclose(samples.var(axis=0), variance, rtol=0.15)
    standard = (samples.mean(axis=0) - moments[1:, ..., :4]) / np.sqrt(variance / 4000)
    assert np.abs(standard).max() < 4.5

    # KL(N(m, s) || N(0, 1)) as the mean of log-density ratios under the posterior, by quadrature.
    z, weights = np.polynomial.hermite_e.hermegauss(40)
    mean, sd = moments[1:, ..., :4, None].astype(float), np.sqrt(variance)[..., None]
    ratio = -0.5 * z**2 - np.log(sd) + 0.5 * (mean + sd * z) ** 2
    expected = (ratio @ weights / weights.sum()).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(posterior.kl()[1:], expected, rtol=1e-4)


def test_images_survive_the_float_scale():
    every = np.arange(256, dtype=np.uint8)
    floats = images_to_float(every)
    assert (float(floats.min()), float(floats.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(images_to_uint8(floats), every)
    np.testing.assert_array_equal(images_to_uint8(jnp.array([-2.0, 0.0, 2.0])), [0, 128, 255])


def test_files_round_trip(tmp_path: Path):
    params = init_params(TINY, jax.random.key(3))
    written = save_autoencoder(tmp_path / "autoencoder", TINY, params, {"steps": 7})
    config, loaded = load_autoencoder(tmp_path / "autoencoder")
    assert config == TINY
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), loaded, params)
    assert written == autoencoder_hash(config, loaded)
    assert json.loads((tmp_path / "autoencoder/config.json").read_text())["extra"] == {"steps": 7}
    names = {path.name for path in (tmp_path / "autoencoder").iterdir()}
    assert names == {"config.json", "params.safetensors"}


def test_hash_sees_every_change():
    params = jax.tree.map(np.asarray, init_params(TINY, jax.random.key(3)))
    hashes = {autoencoder_hash(TINY, params)}
    hashes.add(autoencoder_hash(dataclasses.replace(TINY, scale=0.5), params))
    flat = traverse_util.flatten_dict(params)
    path = ("quant_conv", "bias")
    flat[path] = np.nextafter(flat[path], np.float32(1))
    hashes.add(autoencoder_hash(TINY, traverse_util.unflatten_dict(flat)))
    assert len(hashes) == 3


def test_damaged_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no autoencoder in .*train-vae"):
        load_autoencoder(tmp_path)
    save_autoencoder(tmp_path, TINY, init_params(TINY, jax.random.key(0)))
    path = tmp_path / "params.safetensors"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-5])
    with pytest.raises(UserError, match="is damaged"):
        load_autoencoder(tmp_path)
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged: it is not the file that was written"):
        load_autoencoder(tmp_path)
    safetensors_file.write(path, init_params(TINY, jax.random.key(1)))
    with pytest.raises(UserError, match="is not the file"):
        load_autoencoder(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="depth"):
        load_autoencoder(tmp_path)


def test_state_dict_problems_are_reported_at_once():
    params = init_params(TINY, jax.random.key(0))
    state = to_torch(table(TINY), params)
    state["encoder.conv_in.bias"] = state["encoder.conv_in.bias"][:-1]
    state["loss.logvar"] = state.pop("decoder.conv_out.bias")
    with pytest.raises(UserError) as caught:
        from_torch(table(TINY), state, params)
    for part in (
        "missing decoder.conv_out.bias",
        "unexpected loss.logvar",
        "encoder.conv_in.bias has shape [7], expected [8]",
    ):
        assert part in str(caught.value)


def test_table_stacks_and_reshapes():
    rng = np.random.default_rng(0)
    state = {f"blocks.{i}.qkv.weight": rng.normal(size=(12, 5)) for i in range(3)}
    state |= {f"heads.{i}": rng.normal(size=(1, 4)) for i in range(2)}
    entries = [Entry(f"blocks.{i}.qkv.weight", "qkv.kernel", "linear", i) for i in range(3)]
    entries += [Entry(f"heads.{i}", "heads", "batched", i) for i in range(2)]
    target = {"qkv": {"kernel": np.empty((3, 5, 3, 2, 2))}, "heads": np.empty((2, 4))}
    params = from_torch(entries, state, target)
    # Row 1 * 4 + 0 * 2 + 1 of the product is part 1 (k), head 0, place 1 of the head.
    np.testing.assert_array_equal(
        params["qkv"]["kernel"][2, :, 1, 0, 1], state["blocks.2.qkv.weight"][5]
    )
    np.testing.assert_array_equal(params["heads"][1], state["heads.1"][0])
    back = to_torch(entries, params)
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True)

    with pytest.raises(ValueError, match="not covered"):
        from_torch(entries[1:], {k: state[k] for k in list(state)[1:]}, target)
    with pytest.raises(ValueError, match="twice"):
        to_torch([*entries, entries[0]], params)
