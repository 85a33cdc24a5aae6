"""`train-vae`: its loss against numpy, its measurements and files, and its refusals."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from token_shards import results, stopped_at_the_third_batch
from toy import toy_training

from tokenbridge_jax.autoencoder import (
    AutoencoderConfig,
    init_params,
    load_autoencoder,
    save_autoencoder,
)
from tokenbridge_jax.commands import runner, train_vae
from tokenbridge_jax.data.images import prepare
from tokenbridge_jax.data.sources import DigitsSource
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training import autoencoder_task
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask, picture_batches
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED
from tokenbridge_jax.training.metric_writer import read_metrics

TINY = AutoencoderConfig(
    image_size=8,
    image_channels=1,
    channels=4,
    multipliers=(1, 2),
    blocks=1,
    attention_resolutions=(),
    latent_channels=2,
    scale=1.0,
)
FLAGS = [
    "--config.data.image_size=8",
    "--config.data.workers=1",
    "--config.autoencoder.channels=4",
    "--config.autoencoder.multipliers=(1, 2)",
    "--config.autoencoder.latent_channels=2",
    "--config.vae_training.steps=8",
    "--config.vae_training.warmup_steps=0",
    "--config.vae_training.log_every=1",
    "--config.vae_training.checkpoint_every=5",
    "--config.mesh.fsdp=2",
]


def run(workdir, *more):
    return runner.run("train-vae", ["--workdir", str(workdir), *FLAGS, *more])


@pytest.fixture(scope="module")
def trained(programs, tmp_path_factory):
    """A workdir with an autoencoder trained briefly on the digits, on eight devices."""
    workdir = tmp_path_factory.mktemp("vae")
    assert run(workdir) == 0
    return workdir


def digits(split):
    """The prepared digits."""
    source = DigitsSource(split)
    return np.stack([prepare(source.load(i)[0], 8, 1) for i in range(len(source))])


def apply(workdir, images):
    """Posterior and decoded mean of a trained autoencoder."""
    config, params = load_autoencoder(workdir / "autoencoder")
    task = AutoencoderTask(config, "float32", 0.0)
    posterior = jax.jit(lambda x: autoencoder_task.encode(task.module, params, x))(images)
    decode = jax.jit(lambda x: task.module.apply({"params": params}, x, method="decode"))
    return posterior, np.asarray(decode(posterior.mean))


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_the_loss_equals_numpy(kind, power):
    """In float64 numpy, except for the two halves of the network."""
    task = AutoencoderTask(TINY, "float32", kl_weight=0.3, reconstruction=kind)
    params = init_params(TINY, jax.random.key(1))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    key = jax.random.key(2)
    examples = task.examples({"images": images}, key, None)
    loss, report = jax.jit(lambda p, e: task.loss(p, e, key, None))(params, examples)

    x = images / 127.5 - 1
    variables = {"params": params}
    moments = task.module.apply(variables, jnp.asarray(x, jnp.float32), method="moments")
    mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    latents = mean + np.exp(logvar / 2) * np.asarray(examples["noise"])
    decoded = task.module.apply(variables, jnp.asarray(latents, jnp.float32), method="decode")
    error = np.sum(np.abs(np.asarray(decoded) - x) ** power, axis=(1, 2, 3)) / 64
    kl = np.sum(0.5 * (mean**2 + np.exp(logvar) - 1 - logvar), axis=(1, 2, 3))
    assert float(loss) == pytest.approx(np.mean(error + 0.3 * kl / 64), rel=1e-5)
    assert float(report["reconstruction"]) == pytest.approx(np.mean(error), rel=1e-5)
    assert float(report["kl"]) == pytest.approx(np.mean(kl), rel=1e-4)
    assert abs(np.mean(examples["noise"])) < 0.5
    assert not np.array_equal(examples["noise"][0], examples["noise"][1])


def test_loss_and_gradient_are_finite_for_an_extreme_log_variance():
    task = AutoencoderTask(TINY, "float32", kl_weight=1e-6)
    params = init_params(TINY, jax.random.key(1))
    params["quant_conv"]["bias"] = jnp.array([0.0, 0.0, 1e4, -1e4])
    images = np.zeros((2, 8, 8, 1), np.uint8)
    examples = task.examples({"images": images}, jax.random.key(2), None)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda p: task.loss(p, examples, jax.random.key(3), None)[0])
    )(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_the_scale_gives_the_training_latents_unit_variance(trained):
    config, _ = load_autoencoder(trained / "autoencoder")
    posterior, _ = apply(trained, digits("train"))
    noise = np.random.default_rng(0).normal(size=posterior.mean.shape)
    samples = np.asarray(posterior.mean) + np.exp(np.asarray(posterior.logvar) / 2) * noise
    assert np.std(samples * config.scale) == pytest.approx(1, abs=0.02)
    extra = json.loads((trained / "autoencoder" / "config.json").read_text())["extra"]
    assert extra["latent_std"] == pytest.approx(1 / config.scale)
    assert extra["step"] == 8


def test_it_learns_and_reports_psnr_of_the_validation_images(trained):
    rows = read_metrics(trained / "autoencoder" / "training" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    images = digits("validation").astype(np.float64)
    _, decoded = apply(trained, digits("validation"))
    decoded = np.rint((np.clip(decoded, -1, 1) + 1) * 127.5)
    error = np.mean(np.square(decoded - images), axis=(1, 2, 3))
    expected = np.mean(10 * np.log10(255**2 / error))
    assert rows[-1]["validation_psnr"] == pytest.approx(expected, abs=1e-2)
    assert [row["step"] for row in rows if "validation_psnr" in row] == [5, 8]


def test_pictures_show_originals_beside_reconstructions(trained):
    folder = trained / "autoencoder" / "training" / "reconstructions"
    assert {path.name for path in folder.iterdir()} == {"step_0000005.png", "step_0000008.png"}
    picture = np.asarray(Image.open(folder / "step_0000008.png"))
    originals = digits("validation")
    originals = originals[np.linspace(0, len(originals) - 1, 16).astype(int)]
    # 8x8 pixels are enlarged sixfold, with gaps of 2. Every second image is an original.
    for image, left in zip(originals, (0, 100, 200, 300), strict=False):
        np.testing.assert_array_equal(picture[0:48:6, left : left + 48 : 6], image[:, :, 0])


def test_a_second_run_does_nothing_and_says_so(trained, capsys):
    written = trained / "autoencoder" / "params.safetensors"
    before = written.read_bytes(), written.stat().st_mtime_ns
    assert run(trained) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (written.read_bytes(), written.stat().st_mtime_ns) == before


def test_other_settings_are_refused_by_name(trained, capsys):
    assert run(trained, "--config.autoencoder.blocks=2") == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "belongs to another run: autoencoder.blocks was 1, is 2" in error


@pytest.mark.parametrize("user", ["tokens/dataset.json.partial", "model.json"])
def test_an_autoencoder_in_use_is_not_replaced(trained, tmp_path, capsys, user):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    written = tmp_path / "autoencoder" / "config.json"
    before = written.read_bytes()
    (tmp_path / "tokens").mkdir()
    (tmp_path / user).write_text(json.dumps({"autoencoder_hash": json.loads(before)["hash"]}))
    assert run(tmp_path, "--config.vae_training.steps=9") == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert f"{tmp_path / user} depends on the present autoencoder" in error
    assert re.search(r"it has had \d updates, and now vae_training\.steps=9; give the flags", error)
    assert written.read_bytes() == before
    assert run(tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_stopped_run_continues_bit_for_bit(trained, tmp_path):
    with stopped_at_the_third_batch(train_vae, "make_image_loader"):
        assert run(tmp_path) == EXIT_INTERRUPTED
    assert not (tmp_path / "autoencoder" / "config.json").exists()
    assert run(tmp_path) == 0

    found, expected = (results(path / "autoencoder" / "training") for path in (tmp_path, trained))
    assert [row["step"] for row in found] == list(range(1, 9))
    assert found == expected
    resumed, straight = (
        load_autoencoder(workdir / "autoencoder")[1] for workdir in (tmp_path, trained)
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def test_bfloat16_computes_the_loss_but_not_the_parameters():
    losses = {}
    for precision in ("float32", "bfloat16"):
        task = AutoencoderTask(TINY, precision, kl_weight=1e-3)
        mesh = meshes.make_mesh(1, devices=jax.devices()[:1])
        _, state, step = toy_training(task, mesh)
        images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
        with meshes.use_mesh(mesh):
            state, metrics = step(state, meshes.to_global({"images": images}, mesh), None)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
        losses[precision] = float(metrics["loss"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_an_autoencoder_that_was_not_trained_here_is_not_overwritten(tmp_path, capsys):
    save_autoencoder(tmp_path / "autoencoder", TINY, init_params(TINY, jax.random.key(0)))
    assert run(tmp_path) == runner.EXIT_USER_ERROR
    assert "was not trained here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.image_size=9", "image size 9x9 is not divisible"),
        ("--config.vae_training.reconstruction=l3", "reconstruction is l3; it must be l1 or l2"),
        ("--config.vae_training.batch_size=30", "make it a multiple of 8"),
        ("--config.vae_training.batch_size=0", "vae_training.batch_size is 0"),
        ("--config.vae_training.dtype=int8", "vae_training.dtype is int8"),
        ("--config.autoencoder.channels=48", "autoencoder width 48"),
        ("--config.autoencoder.width=48", "the config has no such key: 'width'"),
        ("--config.data.source=folder", "--config.data.path is not set"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(tmp_path, capsys, flag, message):
    assert run(tmp_path / "new", flag) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_too_few_pictures_to_validate_are_found_before_training(tmp_path, capsys):
    few = ["--config.data.validation_split=", "--config.tokenize.validation_fraction=0.0007"]
    assert run(tmp_path / "new", *few) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "the validation split has 1 of the 2 pictures" in error
    assert "train-vae 8/8" not in error
    assert not (tmp_path / "new").exists()


def test_flops_equal_the_compilers_count():
    """Except for norms, activations, and the places of kernels outside the image."""
    config = dataclasses.replace(TINY, image_size=64, channels=64)
    task = AutoencoderTask(config, "float32", 0.0)
    examples = {
        "images": jnp.zeros((1, 64, 64, 1), jnp.uint8),
        "noise": jnp.zeros((1, 32, 32, config.latent_channels)),
    }
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: init_params(config, key))
    gradient = jax.jit(jax.grad(lambda params: task.loss(params, examples, key, None)[0]))
    counted = gradient.lower(params).cost_analysis()["flops"]
    assert autoencoder_task.training_flops(config) == pytest.approx(counted, rel=0.1)


def test_padding_of_the_last_batch_has_weight_zero():
    mesh = meshes.make_mesh(2, 2, 2)
    # Three images are rounded up to the 4 batch shards.
    batches = picture_batches(DigitsSource("train"), np.arange(6), 8, 1, mesh, batch_size=3)
    first, second = map(jax.device_get, batches)
    assert first["weights"].tolist() == [1, 1, 1, 1]
    assert second["weights"].tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(second["images"][:2], digits("train")[4:6])
