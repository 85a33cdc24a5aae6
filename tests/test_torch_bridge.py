"""State dicts of PyTorch: names, shapes and values both ways, files, and what is refused."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pickle
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import traverse_util
from goldens_model import config_of
from torch_states import ATTENTION, TINY, assert_same, in_diffusers, module_of

from tokenbridge_jax.autoencoder import Autoencoder, AutoencoderConfig, abstract_params, init_params
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.model import SIZES, TokenBridgeConfig
from tokenbridge_jax.quantizer import KL16_CHANNEL_ORDER, Quantizer
from tokenbridge_jax.torch_bridge import files
from tokenbridge_jax.torch_bridge.autoencoder import (
    diffusers_table,
    import_autoencoder,
    infer_config,
    table,
)
from tokenbridge_jax.torch_bridge.model import (
    BUFFERS,
    buffers,
    export_model,
    import_model,
    infer_sizes,
)
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
    broken["boundaries"] = 2 * state["boundaries"]
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
    monkeypatch.setattr("tokenbridge_jax.torch_bridge.autoencoder.abstract_params", cached)
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


# --- Files ----------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_release_is_read(state, tmp_path):
    """With all it holds beside the weights, in either format of torch."""
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    content = {
        "model": tensors,
        "model_ema": {name: tensor.double() for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(batch_size=64),
    }
    for is_zip in (True, False):
        torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=is_zip)
        parts = files.read(tmp_path / "m.pth")
        assert list(parts) == ["model", "model_ema"]
        assert_same(parts["model"], state)
        assert_same(parts["model_ema"], state)
    torch.save(tensors, tmp_path / "plain.pt")
    assert_same(files.read(tmp_path / "plain.pt")["model"], state)


def test_other_kinds_of_files(state, tmp_path):
    assert_same(files.read(GOLDENS / "tokenbridge_tiny.npz")["model"], state)
    np.savez(tmp_path / "bare.npz", **state)
    assert_same(files.read(tmp_path / "bare.npz")["model"], state)
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in state.items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    read = files.read(tmp_path / "half.safetensors")["model"]
    assert_same(read, {name: tensor.float().numpy() for name, tensor in halves.items()})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torch_loads_what_is_written(state, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    parameters = {k: v for k, v in state.items() if k not in BUFFERS}
    files.write(path, {"model": state, "model_ema": parameters})
    if suffix == ".pth":
        content = torch.load(path, weights_only=True)
        assert content["model_ema"].keys() == parameters.keys()
        loaded = content["model"]
    else:
        loaded = safetensors.torch.load_file(path)
    module = module_of(state)
    module.load_state_dict(loaded, strict=True)
    assert_same({k: v.numpy() for k, v in module.state_dict().items()}, state)
    assert_same(files.read(path)["model"], state)


class Hostile:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_a_file_that_would_run_code_is_refused(tmp_path, how):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    held = "posix.system"
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model": Hostile(trace)}, protocol=int(how[-1])))
        held = held if how == "pickle 2" else "no tensors of PyTorch"
    else:
        content = {"model": Hostile(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UserError, match=rf"model.pth is refused: .*holds {held}, ") as caught:
        files.read(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("content", [b"", b"nonsense " * 100])
def test_damaged_files_are_named_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.\w+ (cannot be read|is refused)") as caught:
        files.read(path)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind_are_named_in_one_line(tmp_path):
    """A file of one kind under the name of another, and tensors of kinds no model has."""
    ones = torch.ones(3, 3)
    torch.save({"a": ones}, tmp_path / "torch.npz")
    torch.save({"a": ones.to_sparse()}, tmp_path / "sparse.pth")
    torch.save({"a": torch.ones(3, device="meta")}, tmp_path / "meta.pth")
    safetensors.torch.save_file({"a": ones.to(torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
    safetensors.torch.save_file({"a": ones}, tmp_path / "safetensors.pth")
    np.savez(tmp_path / "words.npz", a=np.array(["x"]))
    np.savez_compressed(tmp_path / "flipped.npz", a=np.arange(1000))
    flipped = bytearray((tmp_path / "flipped.npz").read_bytes())
    flipped[300] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.ones(3))
    (tmp_path / "folder.pth").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=path.name) as caught:
            files.read(path)
        assert "\n" not in str(caught.value)


def test_what_holds_no_state_dict_is_told(tmp_path):
    path = tmp_path / "model.pth"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no state dict but a list"):
        files.read(path)
    torch.save({"model": {"a": 3}}, path)
    with pytest.raises(UserError, match="holds no state dict in 'model'"):
        files.read(path)
    with pytest.raises(UserError, match=r"model.foo ends in none of .pth"):
        files.read(tmp_path / "model.foo")
    with pytest.raises(UserError, match=r"there is no file .*other.pth"):
        files.read(tmp_path / "other.pth")


def test_without_torch_only_its_own_files_are_out_of_reach(state, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    for call in (lambda: files.read(tmp_path / "m.ckpt"), lambda: files.write("m.pth", {})):
        with pytest.raises(
            UserError, match=r"needs PyTorch: pip install 'tokenbridge_jax\[torch\]"
        ):
            call()
    files.write(tmp_path / "m.safetensors", {"model": state})
    assert_same(files.read(tmp_path / "m.safetensors")["model"], state)
