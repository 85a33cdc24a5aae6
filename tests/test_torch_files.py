"""Files of state dicts: reading, writing, and the messages about files that cannot be read."""

import argparse
import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import pickle
import re
import tarfile
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch_states import GOLDENS, STATE, assert_same, module_of

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.official import BUFFERS


def refusal(path):
    """The message about a file that cannot be read, which is one line."""
    with pytest.raises(UserError) as caught:
        state_dicts.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_the_release_is_read(tmp_path):
    """It also holds other things than weights. torch has two formats."""
    tensors = {name: torch.from_numpy(array) for name, array in STATE.items()}
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
        assert_same(parts["model"], STATE)
        assert_same(parts["model_ema"], STATE)
    torch.save({"model": None, "state_dict": tensors}, tmp_path / "wrapped.pt")
    assert_same(state_dicts.read(tmp_path / "wrapped.pt")["model"], STATE)


def test_other_arrays_in_an_npz_file_are_left_out():
    assert_same(state_dicts.read(GOLDENS / "tokenbridge_tiny.npz")["model"], STATE)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torch_loads_what_is_written(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    parameters = {k: v for k, v in STATE.items() if k not in BUFFERS}
    state_dicts.write(path, {"model": STATE, "model_ema": parameters})
    if suffix == ".pth":
        content = torch.load(path, weights_only=True)
        assert content["model_ema"].keys() == parameters.keys()
        loaded = content["model"]
    else:
        loaded = safetensors.torch.load_file(path)
    module = module_of(STATE)
    module.load_state_dict(loaded, strict=True)
    assert_same({k: v.numpy() for k, v in module.state_dict().items()}, STATE)
    assert_same(state_dicts.read(path)["model"], STATE)


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
        held = held if how == "pickle 2" else "no PyTorch tensors"
    else:
        content = {"model": Hostile(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refusal(path)
    assert "model.pth is refused: " in message
    assert f" holds {held}, " in message
    assert not trace.exists()


def test_other_content_than_plain_tensors_is_refused(tmp_path):
    """Special tensors, text, a damaged archive, a single array, a folder, a missing file."""
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
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"a": 3}}, tmp_path / "number.pth")
    for path in tmp_path.iterdir():
        assert path.name in refusal(path)
    assert refusal(tmp_path / "list.pth").endswith("holds a list, not a state dict")
    assert refusal(tmp_path / "number.pth").endswith("holds a, which is not a plain tensor")
    assert re.search(r"there is no file .*other\.pth", refusal(tmp_path / "other.pth"))


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
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer; .* `git lfs pull`"),
        (b"/annex/objects/SHA256E-s4--00.pth\n", "is a git-annex pointer; .* `git annex get`"),
        (b"\n <!DOCTYPE html>\n<html></html>", 'is a web page .*"<!DOCTYPE html> .*download it'),
        ("<html><p>caf\xe9</p>".encode("latin-1"), "is a web page"),
        (b"\xef\xbb\xbf<html>", "is a web page .*download it again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a server's answer, .*download it"),
        (b'{"error": "not found"}', 'is a text that begins with "{"error": "not found"}"; .*downl'),
        (b'["no", "weights"]', "is a text that begins .*download"),
        (b"Entry not found", 'is a text that begins with "Entry not found"; .*download'),
        (b"nonsense " * 100, "is a text that begins "),
        (b"", "is empty; download or copy it again"),
        (b"\0" * 3000, "begins with zeros"),
        (b"\xc3\x28" * 300, "not a PyTorch, safetensors or numpy file, or is damaged"),
        (gzip.compress(b"content", mtime=0), "is compressed with gzip; unpack it"),
        (bz2.compress(b"content"), "is compressed with bzip2; unpack it"),
        (lzma.compress(b"content"), "is compressed with xz; unpack it"),
        (tarred(), "is a tar archive; unpack it"),
        (zipped("model.pth"), "is a zip archive of model.pth; unpack it"),
        (zipped("model/constants.pkl"), "TorchScript.*torch.jit.load"),
        (zipped("model/archive_format"), "torch.export.*torch.export.load"),
    ],
)
def test_the_message_tells_what_a_file_without_weights_is(tmp_path, suffix, content, message):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert re.search(f"model{suffix} cannot be read: it .*{message}", refusal(path))


def save_as(kind, path, tensors):
    """Writes torch tensors to a file of a kind, under any name."""
    buffer = io.BytesIO()
    if kind == "safetensors":
        buffer.write(safetensors.torch.save(tensors))
    elif kind == "npz":
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, buffer, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_the_content_of_a_file_decides_how_it_is_read(tmp_path, kind):
    """The name does not matter. A file that is cut short anywhere is refused."""
    array = np.arange(600, dtype=np.float32).reshape(20, 30)
    for suffix in (".pth", ".ckpt", ".safetensors", ".npz", ".ckpt?dl=1", ""):
        path = tmp_path / f"model{suffix}"
        save_as(kind, path, {"a": torch.from_numpy(array)})
        assert_same(state_dicts.read(path)["model"], {"a": array})
    content = path.read_bytes()
    for length in (1, 2, 7, 9, 30, 500, len(content) // 2, len(content) - 700, len(content) - 1):
        path.write_bytes(content[:length])
        assert "model cannot be read: " in refusal(path)


def test_an_index_reads_all_its_files(tmp_path):
    one, other = np.ones(3, np.float32), np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file({"one": one}, tmp_path / "1-of-2.safetensors")
    safetensors.numpy.save_file({"other": other}, tmp_path / "2-of-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"one": "1-of-2.safetensors", "other": "2-of-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(state_dicts.read(index)["model"], {"one": one, "other": other})
    (tmp_path / "2-of-2.safetensors").write_bytes(POINTER)
    assert re.search(r"2-of-2.safetensors .* is a Git LFS pointer", refusal(index))
    (tmp_path / "2-of-2.safetensors").unlink()
    assert re.search(r"there is no file .*2-of-2.safetensors", refusal(index))
    index.write_text(json.dumps({"weight_map": {"one": index.name}}))
    assert "index.json cannot be read" in refusal(index)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["zip", "safetensors", "npz"])
def test_any_floating_type_is_read_from_any_kind_of_file(tmp_path, kind, dtype):
    array = np.linspace(-3, 3, 100, dtype=np.float32)
    typed = array.astype(jnp.dtype(dtype))
    if kind == "npz":
        np.savez(tmp_path / "m.npz", a=typed)
    else:
        tensors = {"a": torch.from_numpy(array).to(getattr(torch, dtype))}
        save_as(kind, tmp_path / f"m.{kind}", tensors)
    read = state_dicts.read(tmp_path / f"m.{kind}")["model"]
    assert_same(read, {"a": typed.astype(np.float32)})


def test_without_torch_all_but_its_own_files_work(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "m.ckpt")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    message = "needs PyTorch: pip install 'tokenbridge_jax[torch]'"
    assert message in refusal(tmp_path / "m.ckpt")
    with pytest.raises(UserError, match=re.escape(message)):
        state_dicts.write("m.pth", {})
    state_dicts.write(tmp_path / "m.safetensors", {"model": STATE})
    assert_same(state_dicts.read(tmp_path / "m.safetensors")["model"], STATE)
