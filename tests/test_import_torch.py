"""`import-torch` and `export-torch`: files to workdirs and back, and the use of the workdirs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from token_shards import write_tokens
from torch_states import GOLDENS, STATE, TINY, assert_same, in_diffusers, module_of

from tokenbridge_jax.autoencoder import init_params, load_autoencoder, read_description
from tokenbridge_jax.channels import KL16_CHANNEL_ORDER
from tokenbridge_jax.commands import import_torch, runner
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.ldm import table
from tokenbridge_jax.torch_bridge.official import BUFFERS, export_model
from tokenbridge_jax.torch_bridge.table import to_torch

MODEL, AUTOENCODER = GOLDENS / "tokenbridge_tiny.npz", GOLDENS / "kl_vae_tiny.npz"
# Settings that no array shows.
HEADS = {
    "encoder_width": 48, "encoder_heads": 4, "decoder_width": 64, "decoder_heads": 4,
    "dtype": "float32", "scan_layers": True,
}  # fmt: skip
FLAGS = [f"--config.model.{name}={value}" for name, value in HEADS.items()]
VAE = ["--autoencoder", AUTOENCODER, "--scale=0.5"]


def run(command, workdir, *argv):
    return runner.run(command, ["--workdir", str(workdir), *map(str, argv)])


@pytest.fixture(scope="module")
def autoencoder_state():
    return state_dicts.read(AUTOENCODER)["model"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden weights in the format of the release, with an average."""
    path = tmp_path_factory.mktemp("release") / "checkpoint-last.pth"
    average = {k: torch.from_numpy(v + 0.5) for k, v in STATE.items() if k not in BUFFERS}
    model = {k: torch.from_numpy(v) for k, v in STATE.items()}
    torch.save({"model": model, "model_ema": average, "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory):
    """A workdir with this checkpoint and the golden autoencoder."""
    workdir = tmp_path_factory.mktemp("imported")
    assert run("import-torch", workdir, "--checkpoint", checkpoint, *VAE, *FLAGS) == 0
    return workdir


@pytest.fixture(scope="module")
def without_average(tmp_path_factory):
    """A workdir with only the golden weights, and the golden autoencoder."""
    workdir = tmp_path_factory.mktemp("without_average")
    assert run("import-torch", workdir, "--checkpoint", MODEL, *VAE, *FLAGS) == 0
    return workdir


def test_an_imported_model_samples_like_the_release(without_average):
    pipeline = Pipeline.load(without_average, mesh=meshes.make_mesh(devices=jax.devices()[:1]))
    assert pipeline.config.first_token_quirk
    assert pipeline.codec.config.scale == 0.5
    golden = np.load(MODEL)
    labels, orders = (jnp.asarray(golden[f"in/{name}"], jnp.int32) for name in ("labels", "orders"))
    request = Request(labels, jnp.arange(3), orders=orders)
    settings = SamplingSettings(5, 2.5, "constant", temperature=0.0)
    indices = generate(pipeline.config, pipeline.params, request, settings)
    np.testing.assert_array_equal(indices, golden["sample_t0/iter5_cfg2.5_constant/indices"])


def test_an_imported_autoencoder_equals_the_golden_one(imported, autoencoder_state):
    config, params = load_autoencoder(imported / "autoencoder")
    # Three levels with a 4x4 grid, and attention at the coarsest.
    assert (config.image_size, config.attention_resolutions) == (16, (4,))
    assert_same(to_torch(table(config), params), autoencoder_state)
    extra = read_description(imported / "autoencoder")["extra"]
    assert extra == {"imported_from": "kl_vae_tiny.npz"}


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_an_export_equals_the_imported_files(
    imported, checkpoint, autoencoder_state, tmp_path, capsys, name
):
    original = state_dicts.read(checkpoint)
    out, autoencoder = tmp_path / name, tmp_path / f"autoencoder{Path(name).suffix}"
    assert run("export-torch", imported, "--out", out, "--autoencoder", autoencoder) == 0
    assert "first_token_quirk is on" in capsys.readouterr().out
    exported = state_dicts.read(out)
    assert_same(exported["model"], original["model"])
    if name.endswith(".pth"):
        assert_same(exported["model_ema"], original["model_ema"])
    assert_same(state_dicts.read(autoencoder)["model"], autoencoder_state)

    assert run("export-torch", imported, "--out", out, "--ema") == 2
    assert f"{out} is there already; name another file" in capsys.readouterr().err
    out.unlink()
    assert run("export-torch", imported, "--out", out, "--ema") == 0
    averaged = state_dicts.read(out)["model"]
    buffers = {name: original["model"][name] for name in BUFFERS}
    assert_same(averaged, original["model_ema"] | buffers)
    # The release's code requires these names, shapes and buffers.
    tensors = {k: torch.from_numpy(v) for k, v in averaged.items()}
    module_of(original["model"]).load_state_dict(tensors, strict=True)


def test_an_import_of_an_export_gives_the_same_workdir(imported, tmp_path, capsys):
    out = tmp_path / "out.pth"
    assert run("export-torch", imported, "--out", out, "--autoencoder", tmp_path / "a.ckpt") == 0
    again = tmp_path / "again"
    argv = ["--checkpoint", out, "--autoencoder", tmp_path / "a.ckpt", "--scale=0.5", *FLAGS]
    assert run("import-torch", again, *argv) == 0
    assert ModelDescription.load(again) == ModelDescription.load(imported)
    assert storage.read_json(again / "config.json") == storage.read_json(imported / "config.json")
    assert run("export-torch", again, "--out", tmp_path / "twice.pth") == 0
    for part, arrays in state_dicts.read(out).items():
        assert_same(state_dicts.read(tmp_path / "twice.pth")[part], arrays)
    # With the flags that the export prints, weights that were trained here come back as they were.
    own = tmp_path / "own"
    shutil.copytree(imported, own)
    description = ModelDescription.load(own)
    config = dataclasses.replace(
        description.config,
        quantizer=Quantizer.gaussian(description.config.levels, range=4.0),
        channel_order=tuple(reversed(range(description.config.channels))),
        first_token_quirk=False,
    )
    dataclasses.replace(description, config=config).save(own)
    capsys.readouterr()
    out, autoencoder = tmp_path / "own.pth", tmp_path / "own.ckpt"
    assert run("export-torch", own, "--out", out, "--autoencoder", autoencoder) == 0
    told = [word for word in capsys.readouterr().out.split() if word.startswith("--")]
    argv = [*told, "--autoencoder", autoencoder, *FLAGS[-2:]]
    assert run("import-torch", tmp_path / "own again", *argv) == 0
    assert ModelDescription.load(tmp_path / "own again").config == config


TRAIN = [
    f"--config.training.{name}={value}"
    for name, value in {
        "batch_size": 8, "steps": 1, "warmup_steps": 0, "learning_rate": 0.0, "sample_every": 0,
    }.items()
]  # fmt: skip


@pytest.fixture(scope="module")
def with_tokens(without_average):
    """This workdir with shards for training."""
    autoencoder, _ = load_autoencoder(without_average / "autoencoder")
    (without_average / "tokens").mkdir()
    write_tokens(
        without_average / "tokens",
        {"train": [16]},
        autoencoder=autoencoder,
        autoencoder_hash=read_description(without_average / "autoencoder")["hash"],
        channel_order=KL16_CHANNEL_ORDER,
        channel_order_rule="kl16",
    )
    return without_average


def test_training_with_other_sizes_is_refused(with_tokens, tmp_path, capsys):
    shutil.copytree(with_tokens, tmp_path, dirs_exist_ok=True)
    for name, was, other in (("head_width", 32, 16), ("encoder_heads", 4, 8)):
        assert run("train", tmp_path, *TRAIN, f"--config.model.{name}={other}") == 2
        error = capsys.readouterr().err
        assert f"belongs to another run: model.{name} was {was}, is {other}" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


@pytest.mark.parametrize("classes", [10, 12])
def test_training_starts_with_the_imported_weights(with_tokens, tmp_path, capsys, classes):
    """At learning rate 0 it also ends with them, except for a class table of another size."""
    shutil.copytree(with_tokens, tmp_path, dirs_exist_ok=True)
    assert run("train", tmp_path, *TRAIN, f"--config.data.num_classes={classes}") == 0
    error = capsys.readouterr().err
    assert "continues from step 0 of 1" in error
    assert ("data.num_classes was 10, is 12" in error) == (classes == 12)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "1"]
    assert ModelDescription.load(tmp_path).config.first_token_quirk
    assert run("export-torch", tmp_path, "--out", tmp_path / "out.pth") == 0
    for exported in state_dicts.read(tmp_path / "out.pth").values():
        expected = {name: STATE[name] for name in exported}
        if classes == 12:
            drawn = expected["class_emb.weight"] = exported["class_emb.weight"]
            assert drawn.shape == (12, 48)
            assert not np.isin(drawn, STATE["class_emb.weight"]).any()
            assert drawn.std() == pytest.approx(0.02, rel=0.1)
        assert_same(exported, expected)


def write_diffusers(folder, **config):
    """Saves TINY in the format of diffusers; returns the path of the weights."""
    folder.mkdir()
    path = folder / "diffusion_pytorch_model.safetensors"
    state = in_diffusers(to_torch(table(TINY), init_params(TINY, jax.random.key(0))))
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    safetensors.numpy.save_file(arrays, path)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | config))
    return path


@pytest.mark.parametrize(
    ("described", "argv", "scale", "shift"),
    [
        ({}, [], 0.18215, 0),
        ({"scaling_factor": 0.3, "shift_factor": None}, [], 0.3, 0),
        ({"scaling_factor": 0.3611, "shift_factor": 0.125}, [], 0.3611, 0.125),
        ({"scaling_factor": 0.3, "shift_factor": 0.125}, ["--scale=2", "--shift=0"], 2.0, 0),
    ],
)
def test_an_autoencoder_of_diffusers_without_a_model(tmp_path, described, argv, scale, shift):
    path = write_diffusers(tmp_path / "vae", **described)
    size = "--config.data.image_size=8"
    assert run("import-torch", tmp_path / "w", "--autoencoder", path, size, *argv) == 0
    config, params = load_autoencoder(tmp_path / "w" / "autoencoder")
    assert config == dataclasses.replace(TINY, scale=scale)
    expected = np.zeros(8, np.float32) - np.repeat(np.float32([shift, 0]), 4)
    np.testing.assert_array_equal(params["quant_conv"]["bias"], expected)
    remembered = storage.read_json(tmp_path / "w" / "config.json")
    assert remembered["quantizer"]["channel_order"] == "frequency"
    assert remembered["autoencoder"]["multipliers"] == [1, 2]
    # The same autoencoder may be imported again, but not another one.
    assert run("import-torch", tmp_path / "w", "--autoencoder", path, *argv) == 0
    assert run("import-torch", tmp_path / "w", "--autoencoder", path, "--scale=9") == 2


def test_nested_networks_in_half_precision_are_imported(
    autoencoder_state, tmp_path, capsys, monkeypatch
):
    """Messages tell what was taken and what was left out. The exact levels are restored."""
    average = {f"ema.{k}": torch.from_numpy(v).bfloat16() for k, v in STATE.items()}
    other = {k.replace("ema.", "net.module."): tensor + 1 for k, tensor in average.items()}
    checkpoint, autoencoder = tmp_path / "m.ckpt", tmp_path / "sd.bin"
    safetensors.torch.save_file(average | other, checkpoint)
    first_stage = {f"first_stage_model.{k}": v for k, v in autoencoder_state.items()}
    first_stage |= {"first_stage_model.loss.logvar": np.zeros(1, "f4"), "betas": np.ones(1, "f4")}
    safetensors.numpy.save_file(first_stage, autoencoder)
    written = {}
    monkeypatch.setattr(
        import_torch,
        "write_checkpoint",
        lambda *args: written.update(model=args[1], params=args[2]),
    )
    argv = ["--checkpoint", checkpoint, "--autoencoder", autoencoder, "--scale=0.5", "--prefix=ema"]
    assert run("import-torch", tmp_path / "w", *argv, *FLAGS) == 0
    said = capsys.readouterr().out
    assert "m.ckpt: took ema.*, an average, as the parameters too" in said
    assert f"m.ckpt: left out net.* ({len(STATE)})" in said
    assert "sd.bin: took first_stage_model.*" in said
    assert "sd.bin: left out betas.* (1), first_stage_model.loss.* (1)" in said
    config, params = load_autoencoder(tmp_path / "w" / "autoencoder")
    assert_same(to_torch(table(config), params), autoencoder_state)
    model = written["model"]
    assert ModelDescription.load(tmp_path / "w").config == model
    assert model.quantizer == Quantizer.gaussian(model.levels)
    assert list(written["params"]) == ["model"]
    exported = export_model(model, written["params"]["model"])
    for name in STATE.keys() - set(BUFFERS):
        np.testing.assert_array_equal(exported[name], average[f"ema.{name}"].float())


def test_a_refused_import_writes_nothing(imported, tmp_path, capsys):
    workdir = tmp_path / "w"
    vae = write_diffusers(tmp_path / "vae", norm_num_groups=16)
    broken, twice = tmp_path / "broken.npz", tmp_path / "twice.npz"
    np.savez(broken, **{k: STATE[k] for k in STATE if k != "class_emb.weight"}, extra=np.ones(1))
    np.savez(twice, **{f"{part}.{k}": v for part in ("model", "net") for k, v in STATE.items()})
    pointer, page = tmp_path / "lfs.ckpt", tmp_path / "page.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    page.write_text("<!DOCTYPE html>\n<html></html>")
    for argv, message in [
        ([], "nothing to import"),
        (["--checkpoint", MODEL], "there is no autoencoder in"),
        (["--checkpoint", MODEL, *VAE[:2]], "it is not KL-16"),
        (["--checkpoint", MODEL, *VAE], "how many heads an encoder of width 48 has"),
        (["--checkpoint", AUTOENCODER, *VAE], "kl_vae_tiny.npz holds no TokenBridge or MAR model"),
        (["--autoencoder", MODEL], "tokenbridge_tiny.npz: these tensors are not those of a KL"),
        (["--autoencoder", vae], "config.json has norm_num_groups"),
        (["--checkpoint", MODEL, *FLAGS, "--autoencoder", vae, "--scale=1"], "norm_num_groups"),
        (["--checkpoint", broken, *VAE, *FLAGS], "broken.npz: missing class_emb.weight; unexpec"),
        (["--checkpoint", MODEL, "--autoencoder", pointer], "lfs.ckpt cannot be read: it is a Git"),
        (["--checkpoint", page, *VAE], "page.safetensors cannot be read: it is a web page"),
        (["--checkpoint", twice, *VAE], "twice.npz: it holds the network several times (model.*"),
        (["--checkpoint", twice, *VAE, "--prefix=nett"], "say which: --prefix=model or --prefix"),
        (["--checkpoint", MODEL, *VAE, "--prefix=net"], "no file has a network at --prefix=net"),
    ]:
        assert run("import-torch", workdir, *argv) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
        assert {path.name for path in workdir.glob("*")} <= {".lock"}
    assert run("import-torch", imported, "--checkpoint", MODEL) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_a_refused_export_writes_nothing(imported, tmp_path, capsys):
    lone = tmp_path / "lone"
    shutil.copytree(imported, lone, ignore=shutil.ignore_patterns("autoencoder"))
    x, y = tmp_path / "x.pth", tmp_path / "y.pth"
    for workdir, argv, message in [
        (imported, [], "nothing to export"),
        (imported, ["--out", x, "--autoencoder", x], "name one file"),
        (lone, ["--out", x, "--autoencoder", y], "no autoencoder"),
        (imported, ["--out", tmp_path / "x.npz"], "x.npz ends in none of .pth"),
        (tmp_path, ["--out", x], "holds no trained model"),
    ]:
        assert run("export-torch", workdir, *argv) == 2
        assert message in capsys.readouterr().err
    assert not x.exists()


# --- MAR ------------------------------------------------------------------------------------------


def test_mars_weights_become_a_workdir_that_samples(tmp_path, capsys):
    workdir, out = tmp_path / "w", tmp_path / "out.safetensors"
    golden = GOLDENS / "mar_tiny.npz"
    steps = ["--config.model.head_steps=3"]
    assert run("import-torch", workdir, "--checkpoint", golden, *VAE, *FLAGS, *steps) == 0
    out_text, err = capsys.readouterr()
    assert "head diffusion\n" in out_text
    assert "--config mar256 has MAR's settings\n" in err
    assert storage.read_json(workdir / "config.json")["tokenize"]["store"] == "latents"
    config = ModelDescription.load(workdir).config
    assert (config.head, config.head_steps, config.of_latents) == ("diffusion", 3, True)
    sample = ["--num_images=2", "--config.sampling.num_iter=2"]
    assert run("sample", workdir, *sample) == 0
    drawn = np.load(workdir / "samples" / "samples.npz")["arr_0"]
    np.testing.assert_array_equal(
        drawn, Pipeline.load(workdir).generate([0, 1], num_iter=2, guidance=3.1, temperature=0.97)
    )

    capsys.readouterr()
    assert run("export-torch", workdir, "--out", out) == 0
    flags = capsys.readouterr().out.split(f"--checkpoint={out} ")[1].split()
    expected = state_dicts.read(golden)["model"]
    assert_same(safetensors.numpy.load_file(out), expected)
    again = tmp_path / "again"
    assert run("import-torch", again, "--checkpoint", out, *VAE, *FLAGS, *flags) == 0
    assert ModelDescription.load(again).config == config

    Pipeline.load(workdir).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    for row in (
        "| head | diffusion, 2 blocks of width 64, 3 steps |",
        "none: the head draws latents",
    ):
        assert row in card
    assert "channel order" not in card

    # What needs probabilities or indices says so in one line.
    for command, argv, message in (
        ("sample", ["--config.sampling.order=confidence"], "needs probabilities, which model.head"),
        ("evaluate", ["likelihood"], "draws latents: it has no quantizer and no likelihood of"),
        ("evaluate", ["reconstruction"], "draws latents: it has no quantizer and no likelihood of"),
    ):
        assert runner.run(command, [*argv, f"--workdir={workdir}"]) == runner.EXIT_USER_ERROR
        assert message in capsys.readouterr().err
