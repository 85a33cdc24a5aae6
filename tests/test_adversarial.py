"""LDM's losses of the autoencoder: LPIPS and the discriminator, against PyTorch and by the book."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from token_shards import results, stopped_at_the_third_batch
from torch_networks import lpips_network
from toy import toy_training

from tokenbridge_jax.autoencoder import AutoencoderConfig, load_autoencoder
from tokenbridge_jax.commands import runner, train_vae
from tokenbridge_jax.commands.train_vae import make_task
from tokenbridge_jax.config import experiment
from tokenbridge_jax.evaluation import lpips, pixels
from tokenbridge_jax.evaluation.features import ThumbnailExtractor, thumbnails
from tokenbridge_jax.evaluation.metrics import frechet_distance
from tokenbridge_jax.evaluation.moments import gaussian
from tokenbridge_jax.evaluation.reconstruction_scores import make_scores
from tokenbridge_jax.runtime import meshes, safetensors_file
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training import autoencoder_task
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask, Perceptual
from tokenbridge_jax.training.discriminator import Adversary, Discriminator, init_discriminator
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED
from tokenbridge_jax.training.metric_writer import read_metrics

ADVERSARY = Adversary(weight=0.7, channels=8, layers=1)
TINY = AutoencoderConfig(8, 3, 8, (1,), 1, (), 2, 1.0)


def images(count=8, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), np.uint8)


def blurred(one, other):
    """A distance of images that is no mean over pixels."""
    rows = jnp.mean(one - other, axis=2)
    return jnp.sum(jnp.square(rows), axis=(1, 2))


def perturbed(params, seed=5):
    """The parameters with noise on all of them: initial biases of 0 would hide mistakes."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize(("side", "layers", "channels"), [(24, 3, 16), (32, 2, 64)])
def test_the_discriminator_is_pix2pixs_with_group_norm(side, layers, channels):
    """The network of LDM in PyTorch, with another normalisation."""
    adversary = Adversary(1.0, channels=channels, layers=layers)
    adversary.check_image_size(side)
    params = perturbed(meta.unbox(init_discriminator(adversary, 3, jax.random.key(0))))
    x = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    found = jax.jit(Discriminator(adversary, "float32").apply)({"params": params}, x)

    hidden = torch.tensor(x).permute(0, 3, 1, 2)
    for layer in range(layers + 2):
        name = f"conv_{layer}" if layer <= layers else "logits"
        kernel, bias = (torch.tensor(np.asarray(params[name][key])) for key in ("kernel", "bias"))
        stride = 2 if layer < layers else 1
        kernel = kernel.permute(3, 2, 0, 1)
        hidden = torch.nn.functional.conv2d(hidden, kernel, bias, stride, padding=1)
        if layer <= layers:
            assert len(bias) == channels * 2**layer
        if 0 < layer <= layers:
            norm = (torch.tensor(np.asarray(params[f"norm_{layer}"][k])) for k in ("scale", "bias"))
            groups = min(32, hidden.shape[1])
            hidden = torch.nn.functional.group_norm(hidden, groups, *norm, eps=1e-6)
        if layer <= layers:
            hidden = torch.nn.functional.leaky_relu(hidden, 0.2)
    np.testing.assert_allclose(found, hidden.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "layers", "width"), [(40, 1, 80), (20, 3, 40), (12, 3, 48)])
def test_widths_that_have_no_groups_are_refused(channels, layers, width):
    message = f"a discriminator of {channels} channels has a layer of {width}, which must be below"
    with pytest.raises(UserError, match=message):
        Adversary(1.0, channels=channels, layers=layers)


def test_a_start_after_the_end_is_refused():
    config = experiment("digits")
    config.vae_training.update(steps=10, adversarial_weight=0.5, adversarial_start=10)
    with pytest.raises(
        UserError, match=r"adversarial_start=10 is not below vae_training\.steps=10"
    ):
        make_task(config)


def test_too_small_images_are_refused():
    Adversary(1.0, layers=2).check_image_size(12)
    with pytest.raises(UserError, match="3 layers needs images of 24 pixels or more, not 16"):
        AutoencoderTask(TINY.__class__(image_size=16), "float32", 0.0, adversary=Adversary(1.0))


def test_losses_and_gradients_are_those_of_the_equations():
    """With every gradient by automatic differentiation of the whole networks."""
    perceptual = Perceptual(0.3, blurred)
    task = AutoencoderTask(
        TINY, "float32", kl_weight=0.2, perceptual=perceptual, adversary=ADVERSARY
    )
    params = perturbed(meta.unbox(jax.jit(task.init)(jax.random.key(1))))
    examples = task.examples({"images": images()}, jax.random.key(2), None)
    key = jax.random.key(3)
    draw = task.draw(0)
    (loss, report), gradients = jax.jit(
        jax.value_and_grad(lambda p: task.loss(p, examples, key, draw), has_aux=True)
    )(params)

    real = jnp.asarray(examples["images"] / 127.5 - 1, jnp.float32)
    judge = Discriminator(ADVERSARY, "float32")

    def parts(params):
        """Reconstruction, KL per pixel value, the generator's loss, the discriminator's."""
        own = autoencoder_task.without_discriminator(params)
        posterior = task.module.apply({"params": own}, real, method="encode")
        latents = posterior.mean + jnp.exp(posterior.logvar / 2) * examples["noise"]
        decoded = task.module.apply({"params": own}, latents, method="decode")
        fidelity = jnp.mean(jnp.abs(decoded - real)) + 0.3 * jnp.mean(blurred(decoded, real))
        kl = jnp.mean(posterior.kl()) / real[0].size
        logits = [judge.apply({"params": params["discriminator"]}, x) for x in (real, decoded)]
        hinge = jnp.mean(jnp.maximum(0, 1 - logits[0])) + jnp.mean(jnp.maximum(0, 1 + logits[1]))
        return fidelity, kl, -jnp.mean(logits[1]), hinge / 2

    @jax.jit
    def parts_and_gradients(params):
        found, pull_back = jax.vjp(parts, params)
        return found, [pull_back(tuple(row))[0] for row in jnp.eye(len(found))]

    (fidelity, kl, generator, hinge), by_part = parts_and_gradients(params)
    last = [np.linalg.norm(np.ravel(g["decoder"]["conv_out"]["kernel"])) for g in by_part]
    weight = 0.7 * min(last[0] / (last[2] + 1e-4), 1e4 / 192)
    assert float(loss) == pytest.approx(
        float(fidelity + 0.2 * kl + weight * generator + hinge), 1e-4
    )
    assert float(report["adversarial_weight"]) == pytest.approx(weight, rel=1e-3)
    assert float(report["generator"]) == pytest.approx(float(generator), rel=1e-4)
    assert float(report["discriminator"]) == pytest.approx(float(hinge), rel=1e-4)

    expected = jax.tree.map(lambda a, b, c: a + 0.2 * b + weight * c, *by_part[:3])
    expected["discriminator"] = by_part[3]["discriminator"]
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest),
        gradients,
        expected,
    )


def test_the_weight_is_bounded():
    """A discriminator that looks at nothing gives no gradient."""
    task = AutoencoderTask(TINY, "float32", kl_weight=0.0, adversary=ADVERSARY)
    params = meta.unbox(jax.jit(task.init)(jax.random.key(1)))
    params["discriminator"]["logits"]["kernel"] *= 0
    params["decoder"]["conv_out"]["kernel"] *= 1e3  # So that the error has a large gradient.
    examples = task.examples({"images": images()}, jax.random.key(2), None)
    loss = jax.jit(lambda p: task.loss(p, examples, jax.random.key(3), task.draw(0)))
    assert float(loss(params)[1]["adversarial_weight"]) == pytest.approx(0.7 * 1e4 / 192)


def test_devices_do_not_change_the_update():
    """With accumulation, which gives each micro-batch its own weight, on one and eight devices."""
    found = []
    for sizes in [(1, 1, 1), (2, 2, 2)]:
        mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        task = AutoencoderTask(TINY, "float32", kl_weight=1e-3, adversary=ADVERSARY)
        _, state, step = toy_training(task, mesh, accumulation=2)
        with meshes.use_mesh(mesh):
            batch = meshes.to_global({"images": images()}, mesh)
            state, metrics = step(state, batch, task.draw(0))
        # After one step the first moment of Adam is the gradient, except for a factor.
        moments = jax.device_get(state.opt_state[1].mu)
        found.append(({name: float(x) for name, x in metrics.items()}, moments))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found[0][1]))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest),
        found[1][1],
        found[0][1],
    )


@pytest.fixture(scope="module")
def vgg():
    """LPIPS by VGG with random weights: the package's network, and ours."""
    network, backbone, linear = lpips_network("vgg")
    return network, lpips.import_lpips(backbone, linear, "vgg")


def test_the_gradient_of_lpips_is_that_of_its_package(vgg):
    network, params = vgg
    real = jnp.asarray(images(2, 16) / 127.5 - 1, jnp.float32)
    near = real + 0.1 * jax.random.normal(jax.random.key(1), real.shape)
    theirs = torch.tensor(np.asarray(near)).permute(0, 3, 1, 2).requires_grad_()
    distance = network(theirs, torch.tensor(np.asarray(real)).permute(0, 3, 1, 2)).mean()
    distance.backward()

    def mean(x):
        return jnp.mean(lpips.training_distance(params, x, real))

    value_and_gradient = jax.jit(jax.value_and_grad(mean))
    value, gradient = value_and_gradient(near)
    assert float(value) == pytest.approx(distance.item(), rel=1e-4)
    expected = theirs.grad.permute(0, 2, 3, 1)
    np.testing.assert_allclose(
        gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    # Pairs stay on their device: no feature map moves.
    sharding = meshes.batch_sharding(meshes.make_mesh())
    pairs = [jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32, sharding=sharding)] * 2
    compiled = jax.jit(functools.partial(lpips.training_distance, params)).lower(*pairs).compile()
    assert "collective-permute" not in compiled.as_text()
    # Equal images, and grey ones: no gradient is NaN.
    assert not np.asarray(value_and_gradient(real)[1]).any()
    grey = lpips.training_distance(params, near[..., :1], real[..., :1], jnp.bfloat16)
    alone = lpips.training_distance(params, *(jnp.repeat(x[..., :1], 3, -1) for x in (near, real)))
    np.testing.assert_allclose(grey, alone, rtol=0.05)


def test_scores_are_those_of_each_image():
    mesh = meshes.make_mesh(2, 2, 2)
    real = images(7)
    shift = np.random.default_rng(1).integers(-20, 20, real.shape)
    decoded = np.clip(real + shift, 0, 255).astype(np.uint8)
    decoded[0] = real[0]

    def batches():
        for start in (0, 4):
            weights = np.zeros(4, np.float32)
            weights[: 7 - start] = 1
            x = np.resize(real[start:], (4, 8, 8, 3))
            yield meshes.to_global({"images": x, "weights": weights}, mesh)

    def reconstruct(pairs, x):
        """Finds the image among the originals."""
        same = jnp.all(x[:, None] == pairs[0][None], axis=(2, 3, 4))
        return pairs[1][jnp.argmax(same, axis=1)]

    scores = make_scores(reconstruct, mesh, ThumbnailExtractor(), blurred)
    found = scores((jnp.asarray(real), jnp.asarray(decoded)), batches())
    psnr = pixels.psnr(decoded, real)
    psnr[0] = 10 * np.log10(255**2 / (0.25 / real[0].size))
    floats = [x / 127.5 - 1 for x in (decoded, real)]
    expected = {
        "psnr": psnr.mean(),
        "ssim": pixels.ssim(decoded, real).mean(),
        "lpips": float(jnp.mean(blurred(*floats))),
        "thumbnail_distance": frechet_distance(*(gaussian(thumbnails(x)) for x in (real, decoded))),
    }
    assert found == pytest.approx(expected, rel=1e-4)


FLAGS = [
    "--config.data.image_size=8",
    "--config.data.workers=1",
    "--config.autoencoder.channels=4",
    "--config.autoencoder.multipliers=(1,)",
    "--config.autoencoder.blocks=1",
    "--config.autoencoder.latent_channels=2",
    "--config.vae_training.steps=6",
    "--config.vae_training.warmup_steps=0",
    "--config.vae_training.log_every=1",
    "--config.vae_training.checkpoint_every=6",
    "--config.vae_training.perceptual_weight=1",
    "--config.vae_training.adversarial_weight=0.5",
    "--config.vae_training.adversarial_start=3",
    "--config.vae_training.discriminator_layers=1",
    "--config.vae_training.discriminator_channels=4",
]


def run(workdir, *more):
    return runner.run("train-vae", ["--workdir", str(workdir), *FLAGS, *more])


@pytest.fixture
def few_measured(monkeypatch):
    """The scale and the scores are those of few images."""
    monkeypatch.setattr(train_vae, "SCALE_IMAGES", 32)
    monkeypatch.setattr(train_vae, "VALIDATION_IMAGES", 8)


def test_a_run_with_a_discriminator(programs, few_measured, tmp_path, capsys, monkeypatch):
    """It starts late; a run stopped before the start continues over it; its weights stay inside."""
    monkeypatch.setenv("TOKENBRIDGE_NETWORKS", str(tmp_path / "networks"))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(straight) == 0
    line = "trains without vae_training.perceptual_weight: LPIPS needs images of 16 pixels or more"
    assert line in capsys.readouterr().err
    rows = read_metrics(straight / "autoencoder" / "training" / "metrics.jsonl")
    assert ["discriminator" in row for row in rows] == [False] * 3 + [True] * 3
    assert "perceptual" not in rows[-1]
    for name in ("psnr", "ssim", "thumbnail_distance"):
        assert np.isfinite(rows[-1][f"validation_{name}"])
    _, params = load_autoencoder(straight / "autoencoder")
    assert set(params) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}

    with stopped_at_the_third_batch(train_vae, "make_image_loader"):
        assert run(stopped) == EXIT_INTERRUPTED
    assert run(stopped, "--config.vae_training.discriminator_channels=8") == runner.EXIT_USER_ERROR
    message = "discriminator was 4 channels, 1 layers, is 8 channels, 1 layers"
    assert message in capsys.readouterr().err
    assert run(stopped) == 0
    found, expected = (results(x / "autoencoder" / "training") for x in (stopped, straight))
    assert found == expected


def test_lpips_is_used_when_it_was_imported(few_measured, tmp_path, capsys, monkeypatch, vgg):
    folder = tmp_path / "networks"
    monkeypatch.setenv("TOKENBRIDGE_NETWORKS", str(folder))
    facts = {"published": False, "sha256": {"vgg16": "1", "lpips_vgg": "2"}}
    folder.mkdir()
    safetensors_file.write(folder / "lpips_vgg.safetensors", vgg[1])
    (folder / "lpips_vgg.json").write_text(json.dumps(facts))
    settings = [
        "--config.data.image_size=16",
        "--config.vae_training.batch_size=8",
        "--config.vae_training.adversarial_weight=0",
    ]
    assert run(tmp_path / "w", *settings, "--config.vae_training.steps=1") == 0
    rows = read_metrics(tmp_path / "w" / "autoencoder" / "training" / "metrics.jsonl")
    assert rows[0]["loss"] > rows[0]["perceptual"] > 0
    assert rows[-1]["validation_lpips"] > 0
    (folder / "lpips_vgg.json").unlink()
    capsys.readouterr()
    more = "--config.vae_training.steps=2"
    assert run(tmp_path / "w", *settings, more) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert f"{folder} holds no VGG network of LPIPS" in error
    assert "belongs to another run: lpips was" in error
