"""Files of state dicts: what is read from them and written to them, and what is told of others."""

import argparse
import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch_states import assert_same, module_of

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.official import BUFFERS

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def state():
    """The golden state dict."""
    golden = np.load(GOLDENS / "tokenbridge_tiny.npz")
    names = [name for name in golden if name.startswith("state/")]
    return {name.removeprefix("state/"): golden[name] for name in names}


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
        parts = state_dicts.read(tmp_path / "m.pth")
        assert list(parts) == ["model", "model_ema"]
        assert_same(parts["model"], state)
        assert_same(parts["model_ema"], state)
    torch.save(tensors, tmp_path / "plain.pt")
    assert_same(state_dicts.read(tmp_path / "plain.pt")["model"], state)


def test_other_kinds_of_files(state, tmp_path):
    assert_same(state_dicts.read(GOLDENS / "tokenbridge_tiny.npz")["model"], state)
    np.savez(tmp_path / "bare.npz", **state)
    assert_same(state_dicts.read(tmp_path / "bare.npz")["model"], state)
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in state.items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    read = state_dicts.read(tmp_path / "half.safetensors")["model"]
    assert_same(read, {name: tensor.float().numpy() for name, tensor in halves.items()})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torch_loads_what_is_written(state, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    parameters = {k: v for k, v in state.items() if k not in BUFFERS}
    state_dicts.write(path, {"model": state, "model_ema": parameters})
    if suffix == ".pth":
        content = torch.load(path, weights_only=True)
        assert content["model_ema"].keys() == parameters.keys()
        loaded = content["model"]
    else:
        loaded = safetensors.torch.load_file(path)
    module = module_of(state)
    module.load_state_dict(loaded, strict=True)
    assert_same({k: v.numpy() for k, v in module.state_dict().items()}, state)
    assert_same(state_dicts.read(path)["model"], state)


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
        state_dicts.read(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("content", [b"", b"nonsense " * 100])
def test_damaged_files_are_named_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.\w+ (cannot be read|is refused)") as caught:
        state_dicts.read(path)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind_are_named_in_one_line(tmp_path):
    """Tensors of kinds no model has, a damaged archive, a folder."""
    ones = torch.ones(3, 3)
    torch.save({"a": ones.to_sparse()}, tmp_path / "sparse.pth")
    torch.save({"a": torch.ones(3, device="meta")}, tmp_path / "meta.pth")
    safetensors.torch.save_file({"a": ones.to(torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
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
            state_dicts.read(path)
        assert "\n" not in str(caught.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 19332096\n"


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"content")
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors", ".npz"])
def test_what_is_no_file_of_weights_is_told_for_what_it_is(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    for content, message in [
        (POINTER, "is a Git LFS pointer, .* `git lfs pull`"),
        (b"/annex/objects/SHA256E-s4--00.pth\n", "is a git-annex pointer, .* `git annex get`"),
        (b"\n <!DOCTYPE html>\n<html></html>", 'is a web page .*"<!DOCTYPE html> .*download it'),
        ("<html><p>caf\xe9</p>".encode("latin-1"), "is a web page"),
        (b"\xef\xbb\xbf<html>", "is a web page .*download it again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "answer of a server, .*download it"),
        (b'{"error": "not found"}', 'is a text that begins "{"error": "not found"}"; .*download'),
        (b'["no", "weights"]', "is a text that begins .*download"),
        (b"Entry not found", 'is a text that begins "Entry not found"; .*download'),
        (b"", "is empty; download or copy it again"),
        (b"\0" * 3000, "begins with zeros"),
        (b"\xc3\x28" * 300, "no file of PyTorch, safetensors or numpy, or it is damaged"),
        (gzip.compress(b"content"), "is compressed with gzip; unpack it"),
        (bz2.compress(b"content"), "is compressed with bzip2; unpack it"),
        (lzma.compress(b"content"), "is compressed with xz; unpack it"),
        (tarred(), "is a tar archive; unpack it"),
        (zipped("model.pth"), "is a zip archive of model.pth; unpack it"),
        (zipped("model/constants.pkl"), "TorchScript, .*torch.jit.load"),
        (zipped("model/archive_format"), "torch.export, .*torch.export.load"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"model{suffix} cannot be read: it .*{message}") as e:
            state_dicts.read(path)
        assert "\n" not in str(e.value)


def save_as(kind, path, tensors):
    """Tensors of torch in a file of a kind, whatever its name."""
    buffer = io.BytesIO()
    if kind == "safetensors":
        buffer.write(safetensors.torch.save(tensors))
    elif kind == "npz":
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, buffer, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_a_file_is_what_its_content_says(tmp_path, kind):
    """Under any name; cut short anywhere, it is told in one line."""
    array = np.arange(600, dtype=np.float32).reshape(20, 30)
    for suffix in (".pth", ".ckpt", ".safetensors", ".npz", ".ckpt?dl=1", ""):
        path = tmp_path / f"model{suffix}"
        save_as(kind, path, {"a": torch.from_numpy(array)})
        assert_same(state_dicts.read(path)["model"], {"a": array})
    content = path.read_bytes()
    for length in (1, 2, 7, 9, 30, 500, len(content) // 2, len(content) - 700, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="model cannot be read: ") as caught:
            state_dicts.read(path)
        assert "\n" not in str(caught.value)


def test_the_index_of_several_files_is_all_of_them(tmp_path):
    one, other = np.ones(3, np.float32), np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file({"one": one}, tmp_path / "1-of-2.safetensors")
    safetensors.numpy.save_file({"other": other}, tmp_path / "2-of-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"one": "1-of-2.safetensors", "other": "2-of-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(state_dicts.read(index)["model"], {"one": one, "other": other})
    (tmp_path / "2-of-2.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"2-of-2.safetensors .* is a Git LFS pointer"):
        state_dicts.read(index)
    (tmp_path / "2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no file .*2-of-2.safetensors"):
        state_dicts.read(index)
    index.write_text(json.dumps({"weight_map": {"one": index.name}}))
    with pytest.raises(UserError, match=r"index.json cannot be read"):
        state_dicts.read(index)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_any_floating_type_is_read_from_any_kind(tmp_path, dtype):
    array = np.linspace(-3, 3, 100, dtype=np.float32)
    typed = array.astype(jnp.dtype(dtype))
    expected = {"a": typed.astype(np.float32)}
    np.savez(tmp_path / "m.npz", a=typed)
    tensors = {"a": torch.from_numpy(array).to(getattr(torch, dtype))}
    for kind in ("zip", "safetensors"):
        save_as(kind, tmp_path / f"m.{kind}", tensors)
    for path in tmp_path.iterdir():
        assert_same(state_dicts.read(path)["model"], expected)


def test_what_holds_no_state_dict_is_told(tmp_path):
    path = tmp_path / "model.pth"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no state dict but a list"):
        state_dicts.read(path)
    torch.save({"model": {"a": 3}}, path)
    with pytest.raises(UserError, match="holds no state dict in 'model'"):
        state_dicts.read(path)
    with pytest.raises(UserError, match=r"model.foo ends in none of .pth"):
        state_dicts.read(tmp_path / "model.foo")
    with pytest.raises(UserError, match=r"there is no file .*other.pth"):
        state_dicts.read(tmp_path / "other.pth")


def test_without_torch_only_its_own_files_are_out_of_reach(state, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    for call in (
        lambda: state_dicts.read(tmp_path / "m.ckpt"),
        lambda: state_dicts.write("m.pth", {}),
    ):
        with pytest.raises(
            UserError, match=r"needs PyTorch: pip install 'tokenbridge_jax\[torch\]"
        ):
            call()
    state_dicts.write(tmp_path / "m.safetensors", {"model": state})
    assert_same(state_dicts.read(tmp_path / "m.safetensors")["model"], state)
