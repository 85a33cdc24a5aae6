"""`train` with a head of latents: from shards to samples, exact resume, meshes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_line import SMALL
from tiny_model import random_batch, random_params, tiny
from token_shards import results, stopped_at_the_third_batch, write_tokens

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
# Changes of the quick line of digits.
CHANGES = {
    "tokenize.store": "latents",
    "model.head": "diffusion",
    "model.head_steps": 5,
    "model.head_draws": 2,
    "training.accumulation": 2,
    "training.batch_size": 16,
    "training.steps": STEPS,
    "training.warmup_steps": 2,
    "training.learning_rate": 1e-2,
    "training.schedule": "constant",
    "training.checkpoint_every": 20,
    "training.eval_every": 15,
    "training.sample_every": STEPS,
    "training.log_every": 1,
    "training.ema_decay": 0.8,
    "evaluation.every": 0,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}


def run(workdir, command="train", **changes):
    values = CHANGES | {name.replace("__", "."): value for name, value in changes.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return runner.run(command, [f"--workdir={workdir}", *SMALL, *flags])


@pytest.fixture(scope="module")
def straight(programs, tmp_path_factory):
    """Digits, tokenized by an autoencoder with random weights; trained without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    config = AutoencoderConfig(8, 1, 8, (1, 1), 1, (), 4)
    save_autoencoder(workdir / "autoencoder", config, init_params(config, jax.random.key(0)))
    assert run(workdir, "tokenize") == 0
    assert run(workdir) == 0
    return workdir


@pytest.fixture
def other(straight, tmp_path):
    """A workdir with the same autoencoder and shards."""
    for name in ("autoencoder", "tokens"):
        (tmp_path / name).symlink_to(straight / name)
    return tmp_path


def test_a_stopped_run_continues_bit_for_bit(straight, other):
    with stopped_at_the_third_batch(train, "make_loader"):
        assert run(other, training__sample_every=0) == EXIT_INTERRUPTED
    assert checkpoints.latest_step(other / "checkpoints") == 3
    assert run(other, training__sample_every=0) == 0
    assert results(other) == results(straight)
    ours, theirs = (Pipeline.load(workdir).params for workdir in (other, straight))
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


def test_pictures_are_drawn_in_training_and_by_sample(straight):
    assert (straight / "samples" / f"step_{STEPS:07d}.png").exists()
    assert runner.run("sample", [f"--workdir={straight}", "--num_images=20"]) == 0
    with np.load(straight / "samples" / "samples.npz") as file:
        assert file["arr_0"].shape == (20, 8, 8, 1)
        assert len({image.tobytes() for image in file["arr_0"]}) == 20


def test_what_the_shards_lack_is_named(other, tmp_path_factory, refused):
    """Models of latents and shards of indices, and the reverse; nothing is written."""

    def flags(workdir, head):
        changes = {**CHANGES, "model.head": head}
        changed = [f"--config.{name}={value}" for name, value in changes.items()]
        return [f"--workdir={workdir}", *SMALL, *changed]

    message = "model.head='{}' needs {}, but the token shards hold {} only; copy autoenc"
    refused("train", message.format("parallel", "indices", "latents"), flags(other, "parallel"))
    assert not (other / "model.json").exists()
    folder = tmp_path_factory.mktemp("indices")
    (folder / "tokens").mkdir()
    write_tokens(folder / "tokens", {"train": [20]})
    refused("train", message.format("diffusion", "latents", "indices"), flags(folder, "diffusion"))
    assert not (folder / "model.json").exists()


def test_an_order_that_previews_cannot_have_is_refused_first(straight, refused):
    flags = [f"--config.{name}={value}" for name, value in CHANGES.items()]
    flags = [f"--workdir={straight}", *SMALL, *flags, "--config.sampling.order=confidence"]
    refused("train", "sampling.order='confidence' needs probabilities, which model.head", flags)
    assert runner.run("train", [*flags, "--config.training.sample_every=0"]) == 0


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
