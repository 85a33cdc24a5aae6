"""`Pipeline.save_pretrained`: its folder gives the same samples, and numpy can read it."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jobs import REPOSITORY, start_job
from test_import_torch import AUTOENCODER, FLAGS, MODEL, run
from tiny_model import leaf_names

import tokenbridge_jax.pipeline.pipeline as pipeline_module
from tokenbridge_jax import Pipeline
from tokenbridge_jax.pipeline import pretrained
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.pipeline.pretrained import Trained, model_card
from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import state_dicts

SETTINGS = {"num_iter": 3, "guidance": 2.0}
SAMPLING = [f"--config.sampling.{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The golden model with other averaged weights, imported on a machine with eight devices."""
    root = tmp_path_factory.mktemp("workdir")
    state = state_dicts.read(MODEL)["model"]
    average = {name: array + 0.01 for name, array in state.items()}
    for name in ("channel_mask", "reconstruction_values", "boundaries"):
        del average[name]
    state_dicts.write(root / "model.pth", {"model": state, "model_ema": average})
    argv = ["--checkpoint", root / "model.pth", "--autoencoder", AUTOENCODER, "--scale=0.5", *FLAGS]
    argv += [*SAMPLING, "--config.data.path=/home/me/secret"]
    argv += ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    assert run("import-torch", root, *argv) == 0
    return root


@pytest.fixture(scope="module")
def pipeline(workdir):
    return Pipeline.load(workdir)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny-model"
    pipeline.save_pretrained(folder)
    return folder


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_saved_pipeline_is_the_same_bit_for_bit(pipeline, saved):
    again = Pipeline.load(saved)
    assert (again.description, again.step) == (pipeline.description, 0)
    assert again.codec.config == pipeline.codec.config
    jax.tree.map(np.testing.assert_array_equal, again.params, pipeline.params)
    jax.tree.map(np.testing.assert_array_equal, again.codec.params, pipeline.codec.params)
    for result in ("generate", "generate_indices"):
        images = [getattr(p, result)([1, 2, 3], seed=4, **SETTINGS) for p in (pipeline, again)]
        np.testing.assert_array_equal(*images)
    bfloat16 = Pipeline.load(saved, dtype="bfloat16")
    assert bfloat16.config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(bfloat16.params)} == {"float32"}


def test_64_bit_mode_has_no_effect(pipeline, tmp_path, monkeypatch):
    """The folder is given as `~`, which Python must expand too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with jax.enable_x64(True):
        pipeline.save_pretrained("~/hub")
        again = Pipeline.load("~/hub")
        assert {leaf.dtype.name for leaf in jax.tree.leaves(again.params)} == {"float32"}
        images = again.generate([0, 1], seed=3, **SETTINGS)
    np.testing.assert_array_equal(images, pipeline.generate([0, 1], seed=3, **SETTINGS))
    assert (tmp_path / "hub" / "model.json").exists()


def test_the_layout_on_devices_has_no_effect(saved, tmp_path):
    other = Pipeline.load(saved, mesh=meshes.make_mesh(data=2, fsdp=2, tensor=2))
    split = [leaf for leaf in jax.tree.leaves(other.params) if not leaf.is_fully_replicated]
    assert len(split) > 10
    other.save_pretrained(tmp_path / "tiny-model")
    assert contents(tmp_path / "tiny-model") == contents(saved)


def test_files_of_a_folder(saved):
    assert contents(saved).keys() == {
        "README.md", "model.json", "model.safetensors", "config.json",
        "autoencoder/config.json", "autoencoder/params.safetensors",
    }  # fmt: skip
    assert [path.name for path in saved.parent.iterdir()] == ["tiny-model"]
    # No file shows the machine that wrote it.
    assert not any(b"secret" in content for content in contents(saved).values())
    mesh = storage.read_json(saved / "config.json")["mesh"]
    assert mesh == {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}


@pytest.mark.parametrize("document", [REPOSITORY / "docs/python.md", "README.md"])
def test_numpy_alone_reads_it(pipeline, saved, tmp_path, document):
    """The code in the document and in the model card runs without JAX and this package."""
    blocks = re.findall(r"```python\n(.*?)```", (saved / document).read_text(), re.DOTALL)
    example = next(block for block in blocks if "load_file" in block)
    script = (
        "import sys; sys.modules.update(jax=None, flax=None, torch=None, tokenbridge_jax=None)\n"
        f"{example}\nimport numpy\n"
        f"numpy.savez({str(tmp_path / 'weights.npz')!r}, **weights)\n"
        f"numpy.savez({str(tmp_path / 'autoencoder.npz')!r}, **autoencoder)\n"
        "print(json.dumps(model))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=saved, check=True, capture_output=True
    ).stdout
    model = json.loads(output)
    assert model == ModelDescription.load(saved).to_json() | {"step": 0}
    for name, params in (("weights", pipeline.params), ("autoencoder", pipeline.codec.params)):
        with np.load(tmp_path / f"{name}.npz") as read:
            expected = leaf_names(params)
            assert set(read.files) == expected.keys()
            for key, array in expected.items():
                np.testing.assert_array_equal(read[key], array, strict=True)


def test_commands_accept_it_as_a_workdir(workdir, saved, tmp_path, refused, capsys):
    saved = shutil.copytree(saved, tmp_path / "tiny-model")
    for name, folder in (("before", workdir), ("after", saved)):
        argv = ["--num_images=3", "--seed=2", "--output", tmp_path / name]
        assert run("sample", folder, *argv) == 0
        out = tmp_path / f"{name}.pth"
        argv = ["--out", out, "--ema", "--autoencoder", tmp_path / f"{name}.ckpt"]
        assert run("export-torch", folder, *argv) == 0
    samples = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("before", "after")]
    np.testing.assert_array_equal(*samples)
    for suffix in ("pth", "ckpt"):
        before, after = (
            state_dicts.read(tmp_path / f"{name}.{suffix}") for name in ("before", "after")
        )
        jax.tree.map(np.testing.assert_array_equal, before, after)

    capsys.readouterr()
    for command, argv, message in [
        ("export-torch", ["--out", tmp_path / "x.pth"], "holds the averaged parameters alone"),
        ("sample", ["--step=3"], f"there is no checkpoint of step 3; {saved} holds step 0"),
        ("train", [], "is a saved pipeline, not a run"),
        ("import-torch", ["--checkpoint", MODEL], "holds a model already"),
    ]:
        refused(command, message, [f"--workdir={saved}", *map(str, argv)])


def test_the_model_card(pipeline, saved):
    _, header, text = (saved / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "tokenbridge_jax"
    facts = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    parameters = sum(array.size for array in leaf_names(pipeline.params).values())
    assert facts["parameters"] == f"{parameters:,}, averaged (EMA), float32"
    assert facts["classes"] == "10 (0, 1, 2, 3, 4, ...)"
    assert facts["images"] == "16x16 pixels, 3 channels"
    assert facts["positions, channels, levels"] == "16, 16, 16"
    assert facts["quantizer"] == "16 levels, latents in [-5, 5]"
    assert facts["first-token quirk"].startswith("on")
    assert "imported_from kl_vae_tiny.npz" in facts["autoencoder"]
    assert facts["autoencoder's hash"] == pipeline.description.autoencoder_hash
    assert "num_iter 3, order random, temperature 0.97" in facts["sampling"]
    # Imported weights were not trained with the recipe of the config.
    assert "training" not in facts
    trained = Trained(pipeline.description, pipeline.params, pipeline.codec, 5000, pipeline.facts)
    facts = dict(re.findall(r"^\| (.+?) \| (.+) \|$", model_card(trained, "x"), re.MULTILINE))
    assert facts["updates trained"] == "5,000"
    assert "batch_size 2048" in facts["training"]
    assert "num_iter=3, order='random', temperature=0.97)" in text


def test_a_failed_write_leaves_no_folder(pipeline, saved, tmp_path, monkeypatch):
    before = contents(saved)
    (tmp_path / "file").write_text("mine")
    for folder in (saved, saved.parent, tmp_path / "file"):
        with pytest.raises(UserError, match="is there already; name a new folder, or empty it"):
            pipeline.save_pretrained(folder)
    assert contents(saved) == before
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match=r"cannot write .*file"):
        pipeline.save_pretrained(tmp_path / "file" / "folder")
    (tmp_path / "empty").mkdir()
    pipeline.save_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "README.md").write_bytes(
        before["README.md"]
    )  # It contains the name of its folder.
    assert contents(tmp_path / "empty") == before

    def full(path, value):
        raise UserError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(UserError, match="disk is full"):
        pipeline.save_pretrained(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"}


def test_missing_and_damaged_files_are_reported_in_one_line(saved, tmp_path):
    def broken(name, content):
        folder = Path(shutil.copytree(saved, tmp_path / "broken", dirs_exist_ok=True))
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            Pipeline.load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no trained model" in broken("model.json", None)
    assert "there is no autoencoder in" in broken("autoencoder/config.json", None)
    for name in ("model.safetensors", "autoencoder/params.safetensors"):
        assert f"{name} does not exist" in broken(name, None)
    for name in ("model.safetensors", "autoencoder/params.safetensors"):
        assert f"{name} is damaged" in broken(name, (saved / name).read_bytes()[:-1])
        assert f"{name} is damaged" in broken(name, b"")
    for name in ("model.json", "config.json", "autoencoder/config.json"):
        assert f"{name} is not valid JSON" in broken(name, b"{")
    other = (saved / "autoencoder" / "params.safetensors").read_bytes()
    message = broken("model.safetensors", other)
    assert "params/backbone/z_proj/kernel: not in the checkpoint" in message
    assert "params/decoder/conv_in/bias: in the checkpoint, not in the model" in message


def test_the_autoencoder_loads_beside_the_model_and_its_errors_come_first(
    saved, tmp_path, monkeypatch
):
    folder = shutil.copytree(saved, tmp_path / "both")
    (folder / "model.safetensors").unlink()
    model_read, read = threading.Event(), []
    load_autoencoder, load_weights = pipeline_module.load_autoencoder, pretrained.load_weights

    def later(path):
        read.append(model_read.wait(60))
        return load_autoencoder(path)

    def first(*arguments, **others):
        try:
            return load_weights(*arguments, **others)
        finally:
            model_read.set()

    monkeypatch.setattr(pipeline_module, "load_autoencoder", later)
    monkeypatch.setattr(pretrained, "load_weights", first)
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        Pipeline.load(folder)
    with pytest.raises(UserError, match="precision"):
        Pipeline.load(folder, precision="half")
    (folder / "autoencoder" / "params.safetensors").unlink()
    with pytest.raises(UserError, match=r"params\.safetensors does not exist"):
        Pipeline.load(folder)
    assert read == [True] * 2

    def interrupted(*arguments, **others):
        model_read.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "load_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pipeline.load(folder)


def test_processes_of_a_job_write_one_folder(workdir, saved, tmp_path):
    """Parameters are split over both processes. If one cannot write, both report it."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        "from tokenbridge_jax import Pipeline\n"
        "from tokenbridge_jax.runtime import meshes, processes\n"
        "from tokenbridge_jax.runtime.errors import UserError\n"
        "processes.join(True, asks_for_signals=False)\n"
        "pipeline = Pipeline.load(sys.argv[1], mesh=meshes.make_mesh(data=1, fsdp=-1))\n"
        "pipeline.save_pretrained(sys.argv[2])\n"
        "try:\n"
        "    pipeline.save_pretrained(sys.argv[2])\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "processes.leave(0)\n"
    )
    folder = tmp_path / "tiny-model"
    job = start_job([script, workdir, folder], [[], []], devices=2)
    outputs = [process.communicate(timeout=120)[0] for process in job]
    assert [process.returncode for process in job] == [0, 0]
    assert all("is there already" in output for output in outputs)
    assert contents(folder) == contents(saved)
