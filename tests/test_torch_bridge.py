"""PyTorch state dicts: names, shapes and values both ways, networks in files, error messages."""

import argparse
import dataclasses
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from goldens_model import config_of
from torch_states import ATTENTION, GOLDENS, STATE, TINY, assert_same, in_diffusers

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig, abstract_params, init_params
from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.model_config import SIZES, TokenBridgeConfig
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.ldm import NETWORK as AUTOENCODER
from tokenbridge_jax.torch_bridge.ldm import (
    diffusers_table,
    import_autoencoder,
    infer_config,
    table,
)
from tokenbridge_jax.torch_bridge.official import (
    BUFFERS,
    buffers,
    export_model,
    import_model,
    infer_sizes,
    level_values,
)
from tokenbridge_jax.torch_bridge.official import NETWORK as MODEL
from tokenbridge_jax.torch_bridge.parts import find
from tokenbridge_jax.torch_bridge.table import to_torch

OFFICIAL = json.loads((GOLDENS / "official_state_dict_shapes.json").read_text())
CONFIG = config_of(np.load(GOLDENS / "tokenbridge_tiny.npz"))


@pytest.fixture(scope="module")
def autoencoder_params():
    """Parameters of TINY; biases and norms are random too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype("f4"),
        init_params(TINY, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def autoencoder_state(autoencoder_params):
    """Their state dict, in the layout of LDM."""
    return to_torch(table(TINY), autoencoder_params)


def shapes_of(name):
    return {k: jax.ShapeDtypeStruct(tuple(v), np.float32) for k, v in OFFICIAL[name].items()}


# --- Names, shapes and values ---------------------------------------------------------------------


@pytest.mark.parametrize(("size", "name"), [("B", "base"), ("L", "large"), ("H", "huge")])
def test_shapes_give_the_sizes_of_the_published_models(size, name):
    shapes = shapes_of(f"tokenbridge_{name}")
    sizes = infer_sizes(shapes)
    heads = ("encoder_heads", "decoder_heads")
    assert sizes == {k: v for k, v in SIZES[size].items() if k not in heads} | {
        "positions": 256, "buffer": 64, "classes": 1000, "channels": 16, "levels": 64,
        "head": "channel_ar",
    }  # fmt: skip
    config = TokenBridgeConfig(Quantizer.gaussian(64), KL16_CHANNEL_ORDER, **SIZES[size])
    assert {k: v.shape for k, v in buffers(config).items()} == {k: shapes[k].shape for k in BUFFERS}


def test_kl16_has_every_published_name_and_shape():
    shapes = shapes_of("kl16")
    config = infer_config(shapes, image_size=256)
    assert dataclasses.replace(config, scale=0.2325) == AutoencoderConfig.kl16()
    leaves = traverse_util.flatten_dict(nn.unbox(abstract_params(config)), sep=".")
    ours = {e.torch_name: e.expected_shape(leaves[e.path].shape) for e in table(config)}
    assert ours == {name: leaf.shape for name, leaf in shapes.items()}


def test_a_round_trip_of_the_golden_model_changes_nothing():
    fields = CONFIG.to_json() | {"channels": CONFIG.channels, "levels": CONFIG.levels}
    sizes = infer_sizes(STATE)
    assert sizes == {name: fields[name] for name in sizes}
    assert len(sizes) == 13
    params = import_model(CONFIG, {"model": STATE})["model"]
    assert_same(export_model(CONFIG, params), STATE)


def test_an_average_may_have_no_buffers():
    average = {k: v + 1 for k, v in STATE.items() if k not in BUFFERS}
    parts = import_model(CONFIG, {"model": STATE, "model_ema": average})
    bias = [part["backbone"]["decoder_norm"]["bias"] for part in parts.values()]
    np.testing.assert_array_equal(bias[1], bias[0] + 1)


def test_one_message_names_all_mistakes_in_a_model():
    broken = dict(STATE)
    broken["scaler"] = broken.pop("class_emb.weight")
    broken["z_proj.bias"] = STATE["z_proj.bias"][1:]
    broken["channel_mask"] = STATE["channel_mask"][1:]
    broken["boundaries"] = STATE["boundaries"] * np.float32(1.0007)  # Below bfloat16's rounding.
    del broken["reconstruction_values"]
    average = {k: v for k, v in STATE.items() if k != "channel_heads.3.weight"}
    assert infer_sizes(broken)["encoder_width"] == 48
    with pytest.raises(UserError) as caught:
        import_model(CONFIG, {"model": broken, "model_ema": average})
    lines = str(caught.value).split("; ")
    assert sorted(lines) == [
        "model: boundaries holds other values than this model's quantizer or mask",
        "model: channel_mask has shape [15, 16], expected [16, 16]",
        "model: missing class_emb.weight",
        "model: missing reconstruction_values",
        "model: unexpected scaler",
        "model: z_proj.bias has shape [47], expected [48]",
        "model_ema: missing channel_heads.3.weight",
    ]


# --- Buffers of fewer bits ------------------------------------------------------------------------


def rounded(array, dtype):
    """A float32 array of values that were rounded to a type."""
    return array.astype(jnp.dtype(dtype)).astype("f4")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_buffers_in_half_precision_match_those_of_the_model(dtype):
    exact = np.asarray(Quantizer.gaussian(CONFIG.levels).level_values, np.float32)
    read = {name: rounded(array, dtype) for name, array in STATE.items()}
    assert dtype == "float64" or not np.array_equal(read["boundaries"], STATE["boundaries"])
    levels = level_values(read, exact)
    # A float32 buffer is used as it is; a rounded one is replaced by the exact values.
    expected = STATE["reconstruction_values"] if dtype == "float64" else exact
    np.testing.assert_array_equal(levels, expected)
    config = dataclasses.replace(CONFIG, quantizer=Quantizer(tuple(levels.tolist())))
    params = import_model(config, {"model": read})["model"]
    kernel = params["backbone"]["z_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, read["z_proj.weight"].T)
    # Differences above the rounding are still errors.
    wrong = {
        "channel_mask": np.zeros_like(STATE["channel_mask"]),
        "boundaries": rounded(1.05 * STATE["boundaries"], dtype),
    }
    with pytest.raises(UserError) as caught:
        import_model(config, {"model": read | wrong})
    message = "holds other values than this model's quantizer or mask"
    assert str(caught.value) == "; ".join(f"{name} {message}" for name in wrong)


def test_levels_of_the_file_are_used_unless_they_are_the_exact_ones_rounded():
    exact = np.asarray(Quantizer.gaussian(64).level_values, np.float32)
    own = np.linspace(-2.5, 2.5, 64, dtype=np.float32)
    # Values in float32 are used even if they are almost the exact ones.
    near = np.nextafter(exact, np.float32(0))
    for values in (own, rounded(own, "float16"), rounded(own, "bfloat16"), near):
        found = level_values({"reconstruction_values": values}, exact)
        np.testing.assert_array_equal(found, values)
    for state in ({}, {"reconstruction_values": own[1:]}):
        np.testing.assert_array_equal(level_values(state, exact), exact)


# --- Networks in files ----------------------------------------------------------------------------


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(state, word):
    """The names if every layer is wrapped: the wrapper's word stands before the last word."""
    return {re.sub(r"\.(?=[^.]+$)", f".{word}.", name): state[name] for name in state}


NAMES = ("class_emb.weight", "mask_token", "channel_embed", "encoder_blocks.0.attn.qkv.weight")
SMALL = {name: np.full(2, i, np.float32) for i, name in enumerate(NAMES)}
AVERAGE = {name: array + 0.5 for name, array in SMALL.items()}
EMA = {f"model_ema.{name.replace('.', '')}": array for name, array in SMALL.items()}


@pytest.mark.parametrize(
    "content",
    [
        SMALL,
        {"model": SMALL, "epoch": 3, "args": argparse.Namespace(lr=1.0), "model_ema": None},
        {"state_dict": SMALL},
        {"module": SMALL, "ds_version": "0.1"},
        {"model": None, "net": {"generator": SMALL}},
        prefixed(SMALL, "module."),
        {"model": prefixed(SMALL, "_orig_mod.")},
        {"model": prefixed(SMALL, "module._orig_mod.")},
        {"model": prefixed(SMALL, "_orig_mod.module.")},
        {"state_dict": prefixed(SMALL, "model._orig_mod.")},
        inside(SMALL, "_orig_mod"),
        {"model": prefixed(inside(SMALL, "_fsdp_wrapped_module"), "_fsdp_wrapped_module.")},
        {"n_averaged": np.int64(3)} | prefixed(SMALL, "module."),
        {"net": SMALL, "optimizer": {"state": {0: {"exp_avg": np.ones(3)}}, "groups": [{}]}},
    ],
)
def test_a_model_is_found_anywhere_in_a_file(tmp_path, content):
    def tensors(value):
        if isinstance(value, dict):
            return {name: tensors(entry) for name, entry in value.items()}
        return torch.as_tensor(value) if isinstance(value, np.ndarray | np.generic) else value

    torch.save(tensors(content), tmp_path / "m.pth")
    found = state_dicts.read_network(tmp_path / "m.pth", MODEL)
    assert found.parts.keys() == {"model"}
    assert_same(found.parts["model"], SMALL)


def test_parameters_and_their_average(tmp_path):
    for plain, average in (("model", "model_ema"), ("state_dict", "ema"), ("online", "ema_model")):
        found = find(prefixed(SMALL, f"{plain}.") | prefixed(AVERAGE, f"{average}."), MODEL)
        assert_same(found.parts["model"], SMALL)
        assert_same(found.parts["model_ema"], AVERAGE)
    # An average without parameters is used for both.
    found = find(prefixed(AVERAGE, "model_ema.module."), MODEL)
    assert list(found.parts) == ["model"]
    assert_same(found.parts["model"], AVERAGE)
    assert found.notes == ("took model_ema.*, an average, as the parameters too",)
    assert find(prefixed(SMALL, "model."), MODEL).notes == ()


BOTH = prefixed(SMALL, "model.") | prefixed(AVERAGE, "student.net.")
WITH_AVERAGE = BOTH | prefixed(AVERAGE, "ema.")


@pytest.mark.parametrize(
    ("tensors", "choices"),
    [
        (BOTH, [["model"], ["student.net"]]),
        (WITH_AVERAGE, [["model", "ema"], ["student.net", "ema"]]),
        (SMALL | prefixed(SMALL, "copy."), [["."], ["copy"]]),
        (prefixed(SMALL, "ema.") | prefixed(SMALL, "ema2.ema."), [["ema"], ["ema2.ema"]]),
    ],
)
def test_the_message_about_several_copies_offers_choices(tensors, choices):
    with pytest.raises(UserError) as caught:
        find(tensors, MODEL)
    flags = " or ".join("--prefix=" + ",".join(choice) for choice in choices)
    assert str(caught.value).endswith(f"; say which: {flags}")
    for choice in choices:
        assert find(tensors, MODEL, choice).places == tuple(p.strip(".") for p in choice)


def test_a_prefix_chooses_one_of_several_copies():
    found = find(WITH_AVERAGE, MODEL, ["student.net.", "ema", "elsewhere"])
    assert list(found.parts) == ["model", "model_ema"]
    assert_same(found.parts["model"], AVERAGE)
    assert found.notes == ("took student.net.*", "left out model.* (4)")
    assert list(find(WITH_AVERAGE, MODEL, ["ema"]).parts) == ["model"]
    with pytest.raises(UserError, match=r"two tensors mask_token, one .* as module.mask_token"):
        find(SMALL | {"module.mask_token": np.ones(1)}, MODEL)


def test_unknown_tensors_are_errors_only_under_the_networks_prefix():
    stray = prefixed(STATE | {"scaler": np.ones(1, np.float32)}, "net.") | {"beside": np.ones(1)}
    found = find({k: v for k, v in stray.items() if k != "net.mask_token"}, MODEL)
    assert found.notes == ("took net.*", "left out beside.* (1)")
    with pytest.raises(UserError, match=r"^missing mask_token; unexpected scaler$"):
        import_model(CONFIG, found.parts)


@pytest.mark.parametrize(
    ("prefix", "beside", "note"),
    [
        ("", {"loss.logvar": 0, "loss.discriminator.main.0.bias": 0}, "left out loss.* (2)"),
        ("", EMA, "left out model_ema.* (4)"),
        ("first_stage_model.", {"model.diffusion_model.out.0.bias": 0, "betas": 0}, None),
        ("first_stage_model.", {"first_stage_model.loss.logvar": 0}, None),
        ("vae.", prefixed(SMALL, "model."), None),
    ],
)
def test_an_autoencoder_is_found_beside_other_networks(autoencoder_state, prefix, beside, note):
    for layout in (autoencoder_state, in_diffusers(autoencoder_state)):
        found = find(prefixed(layout, prefix) | beside, AUTOENCODER)
        assert_same(found.parts["model"], layout)
        assert any(line.startswith("left out ") for line in found.notes)
        assert note is None or found.notes == (note,)


# --- The autoencoder's layouts --------------------------------------------------------------------


@pytest.mark.parametrize("names", list(ATTENTION))
@pytest.mark.parametrize("linear", [True, False])
def test_the_layout_of_diffusers_is_recognised(
    autoencoder_params, autoencoder_state, names, linear
):
    state = in_diffusers(autoencoder_state, names, linear)
    assert infer_config(state, image_size=8) == TINY
    params = import_autoencoder(TINY, state)
    jax.tree.map(np.testing.assert_array_equal, params, autoencoder_params)


def test_the_published_autoencoders_of_diffusers():
    """SD, SDXL, SD3 and FLUX have 248 tensors, counting the quantization convolutions."""
    config = AutoencoderConfig(
        multipliers=(1, 2, 4, 4), attention_resolutions=(), latent_channels=4, scale=1.0
    )
    leaves = traverse_util.flatten_dict(nn.unbox(abstract_params(config)), sep=".")
    entries = diffusers_table(config)
    shapes = {e.torch_name: e.expected_shape(leaves[e.path].shape) for e in entries}
    assert len(shapes) == len(entries) == 248
    for name, shape in {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
        "decoder.mid_block.attentions.0.to_out.0.bias": (512,),
        "decoder.up_blocks.0.upsamplers.0.conv.bias": (512,),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
        "decoder.up_blocks.3.resnets.2.norm2.weight": (128,),
    }.items():
        assert shapes[name] == shape
    arrays = {k: jax.ShapeDtypeStruct(v, "f4") for k, v in shapes.items()}
    assert infer_config(arrays, 256) == config


@pytest.mark.parametrize("layout", [dict, in_diffusers])
def test_messages_use_the_names_of_the_layout(autoencoder_state, layout):
    names = ("encoder.down.1.block.0.nin_shortcut.bias", "decoder.norm_out.bias")
    shortcut, out = layout({name: autoencoder_state[name] for name in names})
    broken = layout(autoencoder_state) | {"loss.logvar": np.zeros(1)}
    del broken[shortcut]
    broken[out] = broken[out][1:]
    with pytest.raises(UserError) as caught:
        import_autoencoder(infer_config(broken, image_size=8), broken)
    assert str(caught.value) == (
        f"missing {shortcut}; unexpected loss.logvar; {out} has shape [7], expected [8]"
    )


def test_tensors_of_another_network_are_named():
    with pytest.raises(UserError, match="not those of a KL autoencoder: a, b,"):
        infer_config({"a": np.zeros(1), "b": np.zeros(1)}, image_size=8)


def test_one_misshapen_tensor_of_an_autoencoder_is_the_only_one_named(
    autoencoder_state, monkeypatch
):
    """This holds for every tensor, because no size is inferred from one tensor alone."""
    cached = functools.cache(abstract_params)
    monkeypatch.setattr("tokenbridge_jax.torch_bridge.ldm.abstract_params", cached)
    for name, array in autoencoder_state.items():
        broken = autoencoder_state | {name: array[1:]}
        with pytest.raises(UserError) as caught:
            import_autoencoder(infer_config(broken, image_size=8), broken)
        shapes = f"{list(array[1:].shape)}, expected {list(array.shape)}"
        assert str(caught.value) == f"{name} has shape {shapes}"


def test_an_autoencoder_without_quant_convolutions_and_with_a_shift(autoencoder_state):
    """As in SD3 and FLUX, latents are (sample - shift) x scale."""
    state = {k: v for k, v in autoencoder_state.items() if "quant_conv" not in k}
    plain = import_autoencoder(TINY, state)
    shifted = import_autoencoder(TINY, state, shift=0.25)
    module = Autoencoder(TINY)
    images = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def both_ways(params, images, latents):
        variables = {"params": params}
        return (
            module.apply(variables, images, method="encode"),
            module.apply(variables, latents, method="decode"),
            module.apply(variables, images, method=lambda module, x: module.encoder(x)),
        )

    latents = np.random.default_rng(2).normal(size=(1, 4, 4, 4)).astype(np.float32)
    posterior, decoded, hidden = both_ways(plain, images, latents)
    moved, moved_decoded, _ = both_ways(shifted, images, latents - 0.25)
    np.testing.assert_allclose(posterior.mean, hidden[..., :4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved.mean, posterior.mean - 0.25, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(moved.logvar, posterior.logvar)
    np.testing.assert_allclose(moved_decoded, decoded, rtol=0, atol=1e-5)
