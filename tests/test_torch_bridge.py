"""State dicts of PyTorch: names, shapes and values both ways, where they lie, what is refused."""

import argparse
import dataclasses
import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from goldens_model import config_of
from torch_states import ATTENTION, TINY, assert_same, in_diffusers

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig, abstract_params, init_params
from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.model import SIZES, TokenBridgeConfig
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

GOLDENS = Path(__file__).parent / "goldens"
OFFICIAL = json.loads((GOLDENS / "official_state_dict_shapes.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDENS / "tokenbridge_tiny.npz"))


@pytest.fixture(scope="module")
def state(golden):
    """The golden state dict."""
    return {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}


@pytest.fixture(scope="module")
def autoencoder_params():
    """Random, biases and norms too."""
    params = traverse_util.flatten_dict(init_params(TINY, jax.random.key(0)))
    rng = np.random.default_rng(0)
    noisy = {k: np.asarray(v) + rng.normal(0, 0.1, v.shape).astype("f4") for k, v in params.items()}
    return traverse_util.unflatten_dict(noisy)


def shapes_of(name):
    return {k: jax.ShapeDtypeStruct(tuple(v), np.float32) for k, v in OFFICIAL[name].items()}


# --- Names, shapes and values ---------------------------------------------------------------------


@pytest.mark.parametrize(("size", "name"), [("B", "base"), ("L", "large"), ("H", "huge")])
def test_sizes_of_the_published_models_are_read_off_their_shapes(size, name):
    shapes = shapes_of(f"tokenbridge_{name}")
    sizes = infer_sizes(shapes)
    heads = ("encoder_heads", "decoder_heads")
    assert sizes == {k: v for k, v in SIZES[size].items() if k not in heads} | {
        "positions": 256, "buffer": 64, "classes": 1000, "channels": 16, "levels": 64,
    }  # fmt: skip
    config = TokenBridgeConfig(Quantizer.gaussian(64), KL16_CHANNEL_ORDER, **SIZES[size])
    assert {k: v.shape for k, v in buffers(config).items()} == {k: shapes[k].shape for k in BUFFERS}


def test_kl16_has_every_published_name_and_shape():
    shapes = shapes_of("kl16")
    config = infer_config(shapes, image_size=256)
    assert dataclasses.replace(config, scale=0.2325) == AutoencoderConfig.kl16()
    leaves = traverse_util.flatten_dict(nn.unbox(abstract_params(config)))
    ours = {e.torch_name: e.expected_shape(leaves[e.path].shape) for e in table(config)}
    assert ours == {name: leaf.shape for name, leaf in shapes.items()}


def test_the_golden_model_goes_there_and_back_unchanged(golden, state):
    config = config_of(golden)
    fields = config.to_json() | {"channels": config.channels, "levels": config.levels}
    sizes = infer_sizes(state)
    assert sizes == {name: fields[name] for name in sizes}
    assert len(sizes) == 12
    params = import_model(config, {"model": state})["model"]
    assert_same(export_model(config, params), state)


def test_an_average_without_buffers_is_taken_too(golden, state):
    config = config_of(golden)
    average = {k: v + 1 for k, v in state.items() if k not in BUFFERS}
    parts = import_model(config, {"model": state, "model_ema": average})
    bias = [part["backbone"]["decoder_norm"]["bias"] for part in parts.values()]
    np.testing.assert_array_equal(bias[1], bias[0] + 1)


def test_all_that_is_wrong_with_a_model_is_told_at_once(golden, state):
    config = config_of(golden)
    broken = dict(state)
    broken["scaler"] = broken.pop("class_emb.weight")
    broken["z_proj.bias"] = state["z_proj.bias"][1:]
    broken["channel_mask"] = state["channel_mask"][1:]
    broken["boundaries"] = state["boundaries"] * np.float32(1.0007)  # Less than bfloat16 rounds by.
    del broken["reconstruction_values"]
    average = {k: v for k, v in state.items() if k != "channel_heads.3.weight"}
    assert infer_sizes(broken)["encoder_width"] == 48
    with pytest.raises(UserError) as caught:
        import_model(config, {"model": broken, "model_ema": average})
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


def rounded(state, dtype):
    """A state dict that was in this type once."""
    return {name: array.astype(jnp.dtype(dtype)).astype("f4") for name, array in state.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_buffers_of_half_precision_are_those_of_the_model(golden, state, dtype):
    config = config_of(golden)
    exact = np.asarray(Quantizer.gaussian(config.levels).level_values, np.float32)
    read = rounded(state, dtype)
    assert dtype == "float64" or not np.array_equal(read["boundaries"], state["boundaries"])
    levels = level_values(read, exact)
    # The float32 buffer comes as it is, a rounded one as what it was.
    expected = state["reconstruction_values"] if dtype == "float64" else exact
    np.testing.assert_array_equal(levels, expected)
    config = dataclasses.replace(config, quantizer=Quantizer(tuple(levels.tolist())))
    params = import_model(config, {"model": read})["model"]
    kernel = params["backbone"]["z_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, read["z_proj.weight"].T)
    # Other values than the rounded ones are told as ever.
    wrong = {
        "channel_mask": np.zeros_like(state["channel_mask"]),
        "boundaries": rounded({"x": 1.05 * state["boundaries"]}, dtype)["x"],
    }
    with pytest.raises(UserError) as caught:
        import_model(config, {"model": read | wrong})
    message = "holds other values than this model's quantizer or mask"
    assert str(caught.value) == "; ".join(f"{name} {message}" for name in wrong)


def test_levels_are_the_files_unless_they_are_the_exact_ones_rounded():
    exact = np.asarray(Quantizer.gaussian(64).level_values, np.float32)
    own = np.linspace(-2.5, 2.5, 64, dtype=np.float32)
    for values in (own, *(rounded({"x": own}, dtype)["x"] for dtype in ("float16", "bfloat16"))):
        found = level_values({"reconstruction_values": values}, exact)
        np.testing.assert_array_equal(found, values)
    # Of float32, what is within rounding of the exact ones is its own too.
    near = np.nextafter(exact, np.float32(0))
    np.testing.assert_array_equal(level_values({"reconstruction_values": near}, exact), near)
    for state in ({}, {"reconstruction_values": own[1:]}):
        np.testing.assert_array_equal(level_values(state, exact), exact)


# --- Where a network lies in its file -------------------------------------------------------------


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(state, word):
    """As of layers that are wrapped one by one: the word stands before every name's last."""
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
def test_a_model_is_found_wherever_it_lies(tmp_path, content):
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
    # Alone, it is both, which is said.
    found = find(prefixed(AVERAGE, "model_ema.module."), MODEL)
    assert_same(found.parts["model"], AVERAGE)
    assert (list(found.parts), found.notes) == (
        ["model"],
        ("took model_ema.*, an average, as the parameters too",),
    )
    assert find(prefixed(SMALL, "model."), MODEL).notes == ()


def test_of_several_copies_a_flag_takes_one():
    both = prefixed(SMALL, "model.") | prefixed(AVERAGE, "student.net.")
    averaged = both | prefixed(AVERAGE, "ema.")
    for tensors, flags in (
        (both, "--prefix=model or --prefix=student.net"),
        (averaged, "--prefix=model,ema or --prefix=student.net,ema"),
        (SMALL | prefixed(SMALL, "copy."), "--prefix=. or --prefix=copy"),
        (
            prefixed(SMALL, "ema.") | prefixed(SMALL, "ema2.ema."),
            "--prefix=ema or --prefix=ema2.ema",
        ),
    ):
        with pytest.raises(UserError) as caught:
            find(tensors, MODEL)
        assert str(caught.value).endswith(f"; say which: {flags}")
        first = flags.split()[0].removeprefix("--prefix=").split(",")
        assert find(tensors, MODEL, first).places == tuple("" if p == "." else p for p in first)
    found = find(averaged, MODEL, ["student.net.", "ema", "elsewhere"])
    assert list(found.parts) == ["model", "model_ema"]
    assert_same(found.parts["model"], AVERAGE)
    assert found.notes == ("took student.net.*", "left out model.* (4)")
    assert list(find(averaged, MODEL, ["ema"]).parts) == ["model"]
    with pytest.raises(
        UserError, match=r"two tensors mask_token, one of them as module.mask_token"
    ):
        find(SMALL | {"module.mask_token": np.ones(1)}, MODEL)


def test_what_lies_among_a_networks_tensors_stays_to_be_named(golden, state):
    """Only what lies beside it is left out."""
    stray = prefixed(state | {"scaler": np.ones(1, np.float32)}, "net.") | {"beside": np.ones(1)}
    found = find({k: v for k, v in stray.items() if k != "net.mask_token"}, MODEL)
    assert found.notes == ("took net.*", "left out beside.* (1)")
    with pytest.raises(UserError) as caught:
        import_model(config_of(golden), found.parts)
    assert str(caught.value) == "missing mask_token; unexpected scaler"


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
def test_an_autoencoder_is_found_beside_other_networks(autoencoder_params, prefix, beside, note):
    state = to_torch(table(TINY), autoencoder_params)
    for layout in (state, in_diffusers(state)):
        found = find(prefixed(layout, prefix) | beside, AUTOENCODER)
        assert_same(found.parts["model"], layout)
        assert any(line.startswith("left out ") for line in found.notes)
        assert note is None or found.notes == (note,)


# --- The autoencoder's layouts --------------------------------------------------------------------


@pytest.mark.parametrize("names", list(ATTENTION))
@pytest.mark.parametrize("linear", [True, False])
def test_the_layout_of_diffusers_is_recognised(autoencoder_params, names, linear):
    state = in_diffusers(to_torch(table(TINY), autoencoder_params), names, linear)
    config = infer_config(state, image_size=8)
    assert config == TINY
    params = import_autoencoder(config, state)
    jax.tree.map(np.testing.assert_array_equal, params, autoencoder_params)


def test_the_published_autoencoders_of_diffusers():
    """SD, SDXL, SD3 and FLUX: 248 tensors, the quantization convolutions among them or added."""
    config = AutoencoderConfig(
        multipliers=(1, 2, 4, 4), attention_resolutions=(), latent_channels=4, scale=1.0
    )
    leaves = traverse_util.flatten_dict(nn.unbox(abstract_params(config)))
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
    assert (
        infer_config({k: jax.ShapeDtypeStruct(v, "f4") for k, v in shapes.items()}, 256) == config
    )


def test_both_layouts_complain_in_their_own_names(autoencoder_params):
    ldm = to_torch(table(TINY), autoencoder_params)
    theirs = in_diffusers(ldm)
    for state, shortcut, out in (
        (ldm, "encoder.down.1.block.0.nin_shortcut.bias", "decoder.norm_out.bias"),
        (
            theirs,
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "decoder.conv_norm_out.bias",
        ),
    ):
        broken = {k: v for k, v in state.items() if k != shortcut} | {"loss.logvar": np.zeros(1)}
        broken[out] = broken[out][1:]
        with pytest.raises(UserError) as caught:
            import_autoencoder(infer_config(broken, image_size=8), broken)
        assert str(caught.value) == (
            f"missing {shortcut}; unexpected loss.logvar; {out} has shape [7], expected [8]"
        )
    with pytest.raises(UserError, match="not the tensors of a KL autoencoder, but a, b"):
        infer_config({"a": np.zeros(1), "b": np.zeros(1)}, image_size=8)


def test_one_misshapen_tensor_of_an_autoencoder_is_named_alone(autoencoder_params, monkeypatch):
    """Whichever it is: no size is read off a single tensor."""
    cached = functools.cache(abstract_params)
    monkeypatch.setattr("tokenbridge_jax.torch_bridge.ldm.abstract_params", cached)
    state = to_torch(table(TINY), autoencoder_params)
    for name, array in state.items():
        broken = state | {name: array[1:]}
        with pytest.raises(UserError) as caught:
            import_autoencoder(infer_config(broken, image_size=8), broken)
        shapes = f"{list(array[1:].shape)}, expected {list(array.shape)}"
        assert str(caught.value) == f"{name} has shape {shapes}"


def test_an_autoencoder_without_quant_convolutions_and_with_a_shift(autoencoder_params):
    """As SD3's and FLUX's: latents are (sample - shift) x scale."""
    state = to_torch(table(TINY), autoencoder_params)
    state = {k: v for k, v in state.items() if "quant_conv" not in k}
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
