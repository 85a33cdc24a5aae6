"""Trained codebooks against PyTorch, numpy and brute force, and through the commands."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import special, stats
from tiny_model import normal, tiny
from torch.nn import functional
from torch_states import GOLDENS

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import (
    AutoencoderConfig,
    autoencoder_hash,
    init_params,
    load_autoencoder,
    save_autoencoder,
)
from tokenbridge_jax.benchmark import inputs
from tokenbridge_jax.bottleneck import (
    ScalarBottleneck,
    SignBottleneck,
    VectorBottleneck,
    code_use,
    entropy_penalty,
)
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.commands import runner
from tokenbridge_jax.config import experiment
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.tokenizing import quantizer_of
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.quantizer import Codebook, quantizer_from_json
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask
from tokenbridge_jax.training.metric_writer import read_metrics

SIZES = AutoencoderConfig(
    image_size=8, image_channels=1, channels=4, multipliers=(1, 1), blocks=1,
    attention_resolutions=(), latent_channels=3, scale=1.0,
)  # fmt: skip
AUTOENCODERS = {
    "vq": dataclasses.replace(SIZES, bottleneck="vq", codes=300),
    "lfq": dataclasses.replace(SIZES, bottleneck="lfq"),
    "fsq": dataclasses.replace(SIZES, bottleneck="fsq", levels=4),
}
Z, TOWARDS = 1.5 * normal(0, 40, 3), normal(1, 40, 3)


@functools.cache
def untrained(kind: str) -> dict:
    """Parameters of the autoencoder of this kind."""
    return init_params(AUTOENCODERS[kind], jax.random.key(1))


def as_torch(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x), requires_grad=True)


# --- Codes and gradients --------------------------------------------------------------------------


def test_vq_is_that_of_pytorch():
    """The nearest code, and gradients of a loss of the latents plus both terms."""
    codes, bottleneck = normal(2, 7, 3), VectorBottleneck(7)

    def loss(z, codes):
        latents, terms = bottleneck.quantize(z, codes)
        return jnp.sum(latents * TOWARDS) + 0.25 * terms["commitment"] + terms["codebook"]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(Z, codes)
    z, weights = as_torch(Z), as_torch(codes)
    unit, unit_codes = functional.normalize(z, dim=1), functional.normalize(weights, dim=1)
    chosen = torch.cdist(unit, unit_codes).argmin(dim=1)
    nearest = unit_codes[chosen]
    passed = unit + (nearest - unit).detach()
    expected = (passed * torch.tensor(np.asarray(TOWARDS))).sum()
    expected = expected + 0.25 * functional.mse_loss(unit, nearest.detach())
    expected = expected + functional.mse_loss(nearest, unit.detach())
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradients[0], z.grad, atol=1e-5)
    np.testing.assert_allclose(gradients[1], weights.grad, atol=1e-6)

    quantizer = bottleneck.quantizer(np.asarray(codes))
    latents = bottleneck.quantize(Z, codes).latents
    np.testing.assert_array_equal(np.asarray(quantizer.quantize(latents))[:, 0], chosen)
    np.testing.assert_array_equal(quantizer.dequantize(quantizer.quantize(latents)), latents)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_fsq_is_the_papers_equations(levels: int):
    """Appendix A.1 in float64 numpy; the gradient is that of the bound."""
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = 0 if levels % 2 == 1 else 0.5
    z = np.asarray(Z, np.float64)
    bounded = np.tanh(z + np.tan(offset / half)) * half - offset
    expected = np.rint(bounded) / (levels // 2)
    bottleneck = ScalarBottleneck(levels)
    latents = bottleneck.quantize(Z).latents
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    assert len(np.unique(expected)) == levels
    gradient = jax.grad(lambda z: jnp.sum(bottleneck.quantize(z).latents * TOWARDS))(Z)
    slope = half / np.cosh(z + np.tan(offset / half)) ** 2 / (levels // 2)
    np.testing.assert_allclose(gradient, slope * np.asarray(TOWARDS), atol=1e-5)

    quantizer = bottleneck.quantizer()
    indices = np.asarray(quantizer.quantize(latents))
    np.testing.assert_array_equal(indices, np.rint(bounded) + levels // 2)
    np.testing.assert_allclose(quantizer.dequantize(indices), latents, atol=1e-6)


def test_lfq_takes_signs_and_passes_gradients_on():
    bottleneck = SignBottleneck()
    z = Z.at[0, 0].set(0)
    latents, terms = bottleneck.quantize(z)
    signs = np.where(np.asarray(z) > 0, 1.0, -1.0)
    np.testing.assert_array_equal(latents, signs)
    assert float(terms["commitment"]) == pytest.approx(np.mean((np.asarray(z) - signs) ** 2))
    gradient = jax.grad(lambda z: jnp.sum(bottleneck.quantize(z).latents * TOWARDS))(z)
    np.testing.assert_array_equal(gradient, TOWARDS)
    quantizer = bottleneck.quantizer()
    np.testing.assert_array_equal(quantizer.quantize(latents), signs > 0)
    np.testing.assert_array_equal(quantizer.dequantize(quantizer.quantize(latents)), latents)


@pytest.mark.parametrize("bits", [1, 4, 11])
def test_the_entropy_penalty_is_that_of_all_codes(bits: int):
    """By brute force over the 2^D codes; 11 bits are two groups, of 6 and 5."""
    z = 0.4 * np.asarray(normal(bits, 50, bits), np.float64)

    def entropies(z):
        codes = np.array(list(itertools.product([-1, 1], repeat=z.shape[1])))
        distance = ((z[:, None] - codes[None]) ** 2).sum(axis=2)
        p = special.softmax(-distance, axis=1)
        return stats.entropy(p, axis=1).mean(), stats.entropy(p.mean(axis=0))

    groups = [z] if bits < 10 else [z[:, :6], z[:, 6:]]
    of_batch = sum(entropies(group)[1] for group in groups)
    expected = entropies(z)[0] - of_batch
    assert entropies(z)[1] <= of_batch + 1e-9
    assert float(entropy_penalty(jnp.asarray(z, jnp.float32))) == pytest.approx(expected, abs=1e-4)


def test_the_use_of_codes():
    latents = jnp.array([[1, 0], [0, 1], [1, 0], [1, 1], [1, 0]], jnp.float32).reshape(1, 5, 1, 2)
    found = code_use(latents)
    assert float(found["codes_used"]) == 3
    expected = np.exp(stats.entropy([0.6, 0.2, 0.2]))
    assert float(found["perplexity"]) == pytest.approx(expected, rel=1e-6)


# --- Training's loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_the_loss_is_the_sum_of_its_terms(kind: str):
    config = AUTOENCODERS[kind]
    task = AutoencoderTask(config, "float32", 1.0, "l2", commitment_weight=0.3, entropy_weight=0.2)
    params = untrained(kind)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    key = jax.random.key(2)
    examples = task.examples({"images": images}, key, None)
    run = jax.jit(jax.value_and_grad(lambda p: task.loss(p, examples, key, None), has_aux=True))
    (loss, report), gradients = run(params)
    weights = {
        "vq": {"commitment": 0.3, "codebook": 1.0},
        "lfq": {"commitment": 0.3, "entropy": 0.2},
        "fsq": {},
    }[kind]
    expected = report["reconstruction"] + sum(w * report[name] for name, w in weights.items())
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert {"commitment", "codes_used", "perplexity"} <= report.keys()
    # The encoder learns, and so do the codes.
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["quant_conv"]))
    assert kind != "vq" or np.any(gradients["codebook"]["codes"])


# --- Files ----------------------------------------------------------------------------------------


def test_a_codebook_survives_json_and_is_its_own_key():
    codebook = VectorBottleneck(300).quantizer(np.asarray(normal(0, 300, 3)))
    again = quantizer_from_json(json.loads(json.dumps(codebook.to_json())))
    assert isinstance(again, Codebook)
    assert (again, hash(again)) == (codebook, hash(codebook))
    assert again != VectorBottleneck(300).quantizer(np.asarray(normal(1, 300, 3)))
    assert (again.levels, again.index_dtype) == (300, np.uint16)
    config = tiny(head="parallel", quantizer=codebook, channel_order=(0,))
    assert TokenBridgeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_hash_of_a_kl_autoencoder_is_that_of_earlier_versions():
    """Its config has the fields of those versions, and the parameters have the same names."""
    assert set(SIZES.to_json()) == {
        "image_size", "image_channels", "channels", "multipliers", "blocks",
        "attention_resolutions", "latent_channels", "scale",
    }  # fmt: skip
    params = {"a": np.arange(3, dtype=np.float32)}
    hashes = {autoencoder_hash(config, params) for config in (SIZES, *AUTOENCODERS.values())}
    assert len(hashes) == 4
    for config in AUTOENCODERS.values():
        assert AutoencoderConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck": "gan"}, "autoencoder bottleneck 'gan' is not one of kl, vq, lfq, fsq"),
        ({"codes": 1}, "autoencoder codes is 1, must be 2 to 65536"),
        ({"levels": 5000}, "autoencoder levels is 5000, must be 2 to 4096"),
    ],
)
def test_impossible_codebooks_are_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SIZES, **changes)


def test_one_channel_has_nothing_after_it():
    codebook = Codebook(np.eye(3, dtype=np.float32))
    with pytest.raises(UserError, match=r"there is only one; set model\.head=parallel"):
        tiny(quantizer=codebook, channel_order=(0,))
    with pytest.raises(UserError, match=r"reveal_steps=1, or model\.head=parallel"):
        tiny(head="masked", quantizer=codebook, channel_order=(0,))


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_the_codec_goes_through_the_codes(kind: str):
    """Latents are those of the indices, and noise changes nothing. NaN is noticed."""
    config = AUTOENCODERS[kind]
    params = untrained(kind)
    quantizer = quantizer_of(experiment("base"), config, params)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    codec = Codec(config, params, quantizer, mesh)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    encoded, noisy = codec.encode(images), codec.encode(images, np.arange(3))
    assert encoded.indices.shape == (3, 16, config.index_channels)
    assert not np.any(encoded.clipped)
    np.testing.assert_array_equal(noisy.indices, encoded.indices)
    latents = np.asarray(quantizer.dequantize(encoded.indices)).reshape(3, 4, 4, 3)
    np.testing.assert_allclose(encoded.latents, latents, atol=1e-6)
    expected = np.asarray(codec.decode_latents(encoded.latents), int)
    assert np.abs(np.asarray(codec.decode(encoded.indices), int) - expected).max() <= 1
    last = params["quant_conv"] | {"bias": params["quant_conv"]["bias"].at[0].set(jnp.nan)}
    broken = params | {"quant_conv": last}
    assert np.all(Codec(config, broken, quantizer, mesh).encode(images).broken)
    with pytest.raises(UserError, match="latents hold NaN"):
        quantizer.quantize(np.full((1, 3), np.nan, np.float32))


# --- All commands ---------------------------------------------------------------------------------

TINY_RUN = [
    "--config=digits:quick",
    "--config.data.image_size=8",
    "--config.data.workers=1",
    "--config.autoencoder.channels=4",
    "--config.autoencoder.multipliers=(1, 1)",
    "--config.autoencoder.latent_channels=3",
    "--config.tokenize.posterior_samples=2",
    "--config.training.steps=2",
    "--config.training.warmup_steps=0",
    "--config.training.eval_every=0",
    "--config.training.sample_every=0",
    "--config.sampling.order=confidence",
    "--config.sampling.num_iter=2",
    *(f"--config.model.{part}_{size}" for part in ("encoder", "decoder", "head")
      for size in ("width=16", "heads=2", "layers=1")),
]  # fmt: skip


LATENTS = ["diffusion", "flow", "mixture"]
NO_POSTERIOR = "needs an autoencoder with a posterior, but this one has a trained codebook ("


@pytest.mark.parametrize(
    ("kind", "command", "flag", "message"),
    [
        *(("vq", "tokenize", f"--config.tokenize.store={x}", f"tokenize.store={x} {NO_POSTERIOR}vq")
          for x in ("latents", "both")),
        *(("lfq", "train", f"--config.model.head={x}", f"model.head='{x}' {NO_POSTERIOR}lfq")
          for x in LATENTS),
        *(("fsq", "benchmark", f"--config.model.head={x}", f"model.head='{x}' {NO_POSTERIOR}fsq")
          for x in LATENTS),
        ("lfq", "import-torch", "--checkpoint={}/tokenbridge_tiny.npz", f"{NO_POSTERIOR}lfq"),
        ("vq", "export-torch", "--autoencoder=x.safetensors", f"{NO_POSTERIOR}vq); leave out"),
        ("vq", "evaluate", "--perturb=0.1:1", "(vq): the numbers of its codes have no order"),
        ("vq", "evaluate", "--ranges=2", "--ranges does not suit a trained codebook (vq)"),
        ("fsq", "evaluate", "--levels=4", "(fsq): it has the levels that it was trained with"),
    ],
)  # fmt: skip
def test_what_a_codebook_does_not_have_is_refused(refused, tmp_path, kind, command, flag, message):
    """In one line, before anything is written."""
    config = AUTOENCODERS[kind]
    save_autoencoder(tmp_path / "autoencoder", config, untrained(kind))
    if command == "train":
        described = experiment("digits")
        described.data.image_size = 8
        described.autoencoder = {key: getattr(config, key) for key in described.autoencoder}
        shards.write_info(tmp_path / "tokens", inputs.make_info(described))
    words = {"benchmark": ["head"], "evaluate": ["reconstruction"]}.get(command, [])
    workdir = [] if command == "benchmark" else [f"--workdir={tmp_path}"]
    argv = [*words, *workdir, *TINY_RUN, f"--config.autoencoder.bottleneck={kind}"]

    def written() -> set[Path]:
        files = {path for path in tmp_path.rglob("*") if path.is_file()}
        return files - {tmp_path / ".lock"}

    before = written()
    refused(command, message, [*argv, flag.format(GOLDENS)])
    assert written() == before


def test_train_vae_learns_codes_and_reports_their_use(programs, tmp_path):
    steps = [f"--config.vae_training.{s}" for s in ("steps=4", "warmup_steps=0", "log_every=2")]
    chosen = ["--config.autoencoder.bottleneck=vq", "--config.autoencoder.codes=300"]
    workdir = tmp_path / "vq"
    assert runner.run("train-vae", ["--workdir", str(workdir), *TINY_RUN, *steps, *chosen]) == 0
    rows = read_metrics(workdir / "autoencoder" / "training" / "metrics.jsonl")
    assert 1 <= rows[-1]["perplexity"] <= rows[-1]["codes_used"] <= 300
    assert rows[-1]["commitment"] > 0
    config, params = load_autoencoder(workdir / "autoencoder")
    expected = dataclasses.replace(AUTOENCODERS["vq"], image_size=8)
    assert (config, config.scale) == (expected, 1)
    assert params["codebook"]["codes"].shape == (300, 3)


def make_shards(workdir, kind: str, *head: str) -> shards.DatasetInfo:
    config = AUTOENCODERS[kind]
    save_autoencoder(workdir / "autoencoder", config, untrained(kind))
    flags = [f"--config.model.{setting}" for setting in head]
    assert not runner.run("tokenize", ["--workdir", str(workdir), *TINY_RUN, *flags])
    return shards.read_info(workdir / "tokens")


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_shards_have_one_view_of_the_codebooks_indices(programs, capsys, tmp_path, kind: str):
    """Though the config asks for two samples: there is no posterior to draw them of."""
    info = make_shards(tmp_path, kind)
    assert (info.views, info.channels) == (1, AUTOENCODERS[kind].index_channels)
    kinds = {"vq": (300, np.uint16), "lfq": (2, np.uint8), "fsq": (4, np.uint8)}
    assert (info.quantizer.levels, info.record["indices"].base) == kinds[kind]
    # The index of the image and its label are 12 bytes.
    size = 12 + 16 * info.channels * kinds[kind][1]().itemsize
    [said] = [x for x in capsys.readouterr().err.splitlines() if "bytes an image" in x]
    assert said.endswith(f"before compression: {size} with tokenize.store=indices")


@pytest.mark.parametrize(
    ("kind", "head"),
    [("vq", ["head=parallel"]), ("lfq", ["head=parallel", "channels_per_group=3"])],
)
def test_train_and_sample(programs, tmp_path, kind: str, head: list[str]):
    make_shards(tmp_path, kind, *head)
    for command in (["train"], ["sample", "--num_images=4"]):
        assert not runner.run(command[0], ["--workdir", str(tmp_path), *command[1:]])
    with np.load(tmp_path / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 8, 8, 1)
    if kind == "vq":
        evaluate = ["reconstruction", "--workdir", str(tmp_path), "--num_images=8"]
        assert not runner.run("evaluate", evaluate)
        [result] = tmp_path.glob("evaluation/*/result.json")
        found = json.loads(result.read_text())
        rows = found["metrics"]["rows"]
        # Nothing is moved. The latents are codes already, so that only rounding may differ.
        assert [row["levels"] for row in rows] == [None, 300]
        assert rows[1]["latent_mse"] < 1e-12
        Pipeline.load(tmp_path).save_pretrained(tmp_path / "saved")
        for text in (json.dumps(found), (tmp_path / "saved" / "README.md").read_text()):
            assert "300 codes of length 1, of 3 numbers each" in text
