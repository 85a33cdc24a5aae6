"""`train` with a head of latents: from shards to samples, exact resume, meshes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_line import SMALL
from tiny_model import random_batch, random_params, tiny
from token_shards import TRAINING, results, stopped_at_the_third_batch, write_tokens, write_workdir

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import AutoencoderConfig, init_params, save_autoencoder
from tokenbridge_jax.commands import runner, train
from tokenbridge_jax.heads import diffusion
from tokenbridge_jax.quantizer import Unquantized
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training import checkpoints
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import make_validation

STEPS = 30
HEAD = {"model.head": "diffusion", "model.head_steps": 5, "model.head_draws": 2}
FLAGS = TRAINING | HEAD | {
    "training.accumulation": 2,
    "training.steps": STEPS,
    "training.learning_rate": 1e-2,
    "training.schedule": "constant",
    "training.checkpoint_every": 20,
    "training.eval_every": 15,
    "training.sample_every": 0,
    "training.ema_decay": 0.8,
    "mesh.tensor": 2,
}  # fmt: skip


def run(workdir, **changes):
    values = FLAGS | {name.replace("__", "."): value for name, value in changes.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return runner.run("train", ["--workdir", str(workdir), *flags])


@pytest.fixture(scope="module")
def straight(programs, tmp_path_factory):
    """A workdir trained without a stop, on a 2 x 2 x 2 mesh."""
    workdir = tmp_path_factory.mktemp("straight")
    write_workdir(workdir, store="latents", flips=True)
    assert run(workdir) == 0
    return workdir


def test_a_stopped_run_continues_bit_for_bit(straight, tmp_path):
    write_workdir(tmp_path, store="latents", flips=True)
    with stopped_at_the_third_batch(train, "make_loader"):
        assert run(tmp_path) == EXIT_INTERRUPTED
    assert checkpoints.latest_step(tmp_path / "checkpoints") == 3
    assert run(tmp_path) == 0
    assert results(tmp_path) == results(straight)
    ours, theirs = (Pipeline.load(workdir).params for workdir in (tmp_path, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_training_lowers_the_loss(straight):
    """Without knowledge of the noise its squared error is 1; the variance's bound adds to it."""
    lines = results(straight)
    losses = [row["loss"] for row in lines]
    assert np.mean(losses[:3]) > 0.9
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    found = {row["step"]: row["val_loss"] for row in lines if "val_loss" in row}
    assert list(found) == [15, 30]
    assert found[30] < found[15]
    assert found[30] == pytest.approx(np.mean(losses[-5:]), rel=0.3)
    assert not any(name.startswith("val_nll") for row in lines for name in row)


def test_what_the_shards_lack_is_named(straight, tmp_path, capsys):
    """Models of latents and shards of indices, and the reverse; nothing is written."""
    (tmp_path / "tokens").mkdir()
    write_tokens(tmp_path / "tokens", {"train": [20]}, channel_order_rule="frequency, over 20")
    assert run(tmp_path) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "model.head='diffusion' needs latents, but the token shards hold indices only" in error
    assert "--config.tokenize.store=latents (or both)" in error
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokens").symlink_to(straight / "tokens")
    assert run(other, model__head="channel_ar") == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "model.head='channel_ar' needs indices, but the token shards hold latents o" in error
    assert error.count("\n") == 1
    assert not (other / "model.json").exists()


def test_evaluate_likelihood_says_why_in_one_line(straight, refused):
    flags = [f"--workdir={straight}"]
    refused("evaluate", "'diffusion' draws latents: it has no", ["likelihood", *flags])


def test_validation_is_the_mean_loss_at_fixed_noise(monkeypatch):
    """Of a loss whose mean is known: the squared difference of latents and noise."""

    def losses(self, feature, targets, time, noise):
        return jnp.square(targets[None] - noise), jnp.zeros_like(noise)

    monkeypatch.setattr(diffusion.DiffusionHead, "losses", losses)
    config = tiny(head="diffusion", quantizer=Unquantized(), head_draws=2, head_chunk=16)
    params, mesh = random_params(config), meshes.make_mesh(2, 2, 2)
    batch = random_batch(config, 96) | {"weights": np.ones(96, np.float32)}
    validate = make_validation(config, MaskSampler(config.positions, bucket=8), mesh)
    with meshes.use_mesh(mesh):
        found = validate(params, [batch])
        assert validate(params, [batch]) == found
        # Images without weight do not count.
        padded = {name: np.concatenate([x, x[:8]]) for name, x in batch.items()}
        padded["indices"][96:] = 100
        padded["weights"][96:] = 0
        assert validate(params, [padded]) == pytest.approx(found, rel=1e-6)
    # About 20,000 noises, and 1 in 8 positions is not hidden.
    expected = 1 + np.square(batch["indices"]).mean()
    assert found == pytest.approx(expected, rel=0.04)
    assert found != expected


@pytest.mark.usefixtures("programs")
def test_the_line_of_digits_with_the_diffusion_head(tmp_path):
    """All commands from images to samples, with random weights of the autoencoder."""
    flags = [*SMALL, *(f"--config.{name}={value}" for name, value in HEAD.items())]
    flags += ["--config.tokenize.store=latents", "--config.evaluation.every=0"]
    flags += ["--config.training.sample_every=4"]
    shape = dict(image_size=8, image_channels=1, channels=8, multipliers=(1, 1), blocks=1)
    config = AutoencoderConfig(**shape, attention_resolutions=(), latent_channels=4)
    params = init_params(config, jax.random.key(0))
    save_autoencoder(tmp_path / "autoencoder", config, params)
    assert runner.run("tokenize", [f"--workdir={tmp_path}", *flags]) == 0
    assert runner.run("train", [f"--workdir={tmp_path}"]) == 0
    assert "val_loss" in results(tmp_path)[-1]
    assert (tmp_path / "samples" / "step_0000004.png").exists()
    assert runner.run("sample", [f"--workdir={tmp_path}", "--num_images=20"]) == 0
    with np.load(tmp_path / "samples" / "samples.npz") as file:
        assert file["arr_0"].shape == (20, 8, 8, 1)
