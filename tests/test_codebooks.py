"""The script that compares codebooks: scores against NumPy, what it trains, and a second start."""

import importlib
import json
import sys
from functools import partial

import jax
import numpy as np
import pytest
from checkout import LAUNCH
from token_shards import nearest, write_pictures

from tokenbridge_jax.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    init_params,
    save_autoencoder,
)
from tokenbridge_jax.commands.arguments import config_from
from tokenbridge_jax.config import autoencoder_config
from tokenbridge_jax.evaluation.features import thumbnails
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import storage

sys.path.insert(0, str(LAUNCH))  # Scripts import from their own folder.
codebooks, scripts = map(importlib.import_module, ("codebooks", "scripts"))
AUTOENCODER = AutoencoderConfig(
    image_size=8, image_channels=3, channels=4, multipliers=(1,), blocks=1,
    attention_resolutions=(), latent_channels=4, scale=1.5,
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A workdir with pictures of three classes and an untrained autoencoder; no EfficientNet."""
    monkeypatch.setattr(codebooks, "lite0", lambda: thumbnails)
    (tmp_path / "pictures").mkdir()
    changes = {
        "data.path": write_pictures(tmp_path / "pictures"),
        "data.image_size": 8,
        "data.workers": 1,
        "tokenize.batch_size": 8,
        "tokenize.validation_fraction": 0.5,
        "vae_training.batch_size": 8,
        "vae_training.warmup_steps": 0,
        "vae_training.steps": 400,  # Not what the autoencoder was trained for.
    } | {f"autoencoder.{key}": getattr(AUTOENCODER, key) for key in (
        "channels", "multipliers", "blocks", "latent_channels"
    )}  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    folder = tmp_path / "run"
    config = config_from(["--config=cifar10:quick", *flags])
    storage.write_json(folder / "config.json", config.to_dict())
    params = init_params(AUTOENCODER, jax.random.key(0))
    save_autoencoder(folder / "autoencoder", AUTOENCODER, params, {"step": 2})
    return folder


def train(command: str, folder, *flags: str) -> None:
    """In place of train-vae, which other tests run: the parameters are those of the start."""
    assert command == "train-vae"
    config = codebooks.run_config(folder, *flags)
    sizes = autoencoder_config(config)
    params = init_params(sizes, jax.random.key(1))
    save_autoencoder(folder / "autoencoder", sizes, params, {"step": config.vae_training.steps})


def start(monkeypatch, run, *arguments: str) -> int:
    argv = ["codebooks.py", f"--run={run}", f"--workdir={run.parent / 'w'}", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    return scripts.run_script(codebooks.main)


def test_scores_are_those_of_numpy(run, tmp_path):
    """Latents and levels one by one, from the definitions."""
    config = codebooks.run_config(run)
    originals = codebooks.Originals.of(run, config, 100)
    found = codebooks.measure(originals, config, run, "kl")
    images, params = originals.pictures.images, init_params(AUTOENCODER, jax.random.key(0))
    apply = jax.jit(
        partial(Autoencoder(AUTOENCODER).apply, {"params": params}), static_argnames="method"
    )
    latents = np.asarray(apply(images / np.float32(127.5) - 1, method="encode").mean)
    latents = latents * AUTOENCODER.scale
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["kl, continuous", *(f"kl, {v} levels" for v in (4, 8, 16, 32, 64))]
    assert found["updates"] == 2
    for name, row in rows.items():
        changed = latents
        if name != "kl, continuous":
            quantizer = Quantizer.gaussian(int(name.split()[1]), config.quantizer.range)
            values = np.array(quantizer.level_values)
            indices = nearest(latents, values, config.quantizer.range)
            changed = (values / 3 * config.quantizer.range)[indices].astype(np.float32)
            _, counts = np.unique(indices.reshape(-1, 4), axis=0, return_counts=True)
            share = counts / counts.sum()
            assert row["codes_used"] == len(counts)
            expected = np.exp(-(share * np.log(share)).sum())
            assert row["perplexity"] == pytest.approx(expected, rel=1e-5)
            # 8 x 8 positions of 4 channels.
            assert row["bits"] == 256 * np.log2(quantizer.levels)
        decoded = np.asarray(apply(changed / AUTOENCODER.scale, method="decode"))
        again = np.round((np.clip(decoded, -1, 1) + 1) * 127.5)
        error = ((images - again) ** 2).mean(axis=(1, 2, 3))
        assert row["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), abs=1e-3)
        assert row["accuracy"] is None
    assert rows["kl, continuous"]["bits"] == 256 * 16
    assert "perplexity" not in rows["kl, continuous"]
    exact = originals.scores(np.maximum(images, 1) - 1)
    assert exact["frechet_distance"] == pytest.approx(192 / 255**2, rel=0.01)
    assert exact["ssim"] == pytest.approx(1, abs=1e-3)


def test_a_codebook_is_trained_as_long_as_the_run_and_once(run, monkeypatch, capsys):
    names = "--autoencoders=kl,fsq"
    monkeypatch.setattr(codebooks, "run_logged", train)
    assert start(monkeypatch, run, names) == 0
    workdir = run.parent / "w"
    text = (workdir / "codebooks.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    heading, _, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line[0:1] == "|"]
    assert len(heading) == len(rows[-1]) == 8
    assert [row[0].strip() for row in rows] == [
        "originals", "kl, continuous", *(f"kl, {v} levels" for v in (4, 8, 16, 32, 64)), "fsq",
    ]  # fmt: skip
    assert rows[-1][5].strip() == "768"  # 64 positions of 12 bits.
    assert text.endswith("Updates: kl 2, fsq 2.\n")
    found = storage.read_json(workdir / "codebooks.json")
    assert found["split"] == "validation"
    assert (workdir / "codebooks.png").stat().st_size > 10_000
    assert (workdir / "kl" / "autoencoder").is_symlink()

    monkeypatch.setattr(codebooks, "make_autoencoder", None)  # Not called again.
    assert start(monkeypatch, run, names) == 0
    assert storage.read_json(workdir / "codebooks.json") == found
    assert start(monkeypatch, run, names, "--config.seed=1") == 2
    assert 'flags = [], and now it is ["--config.seed=1"]' in capsys.readouterr().err


def test_who_trains_which_autoencoder(run, monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(codebooks, "run_logged", lambda *call: calls.append(call))
    lengths = "--config.vae_training.steps=7", "--config.vae_training.learning_rate=0.1"
    for flags in (lengths, lengths[1:]):  # The run's own is trained again, too.
        codebooks.make_autoencoder(run, tmp_path / "new", *flags)
    codebooks.make_autoencoder(run, tmp_path / "same", "--config.data.path=/other")
    folder = tmp_path / "new"
    assert calls == [
        ("train-vae", folder, *lengths),
        ("train-vae", folder, "--config.vae_training.steps=2", lengths[1]),
    ]
    assert (tmp_path / "same" / "autoencoder").resolve() == run / "autoencoder"

    description = run / "autoencoder" / "config.json"
    storage.write_json(description, json.loads(description.read_text()) | {"extra": {}})
    assert start(monkeypatch, run, "--autoencoders=vq") == 2
    assert "was not trained by train-vae" in capsys.readouterr().err
    assert start(monkeypatch, tmp_path / "missing", "--autoencoders=vq") == 2
    assert "missing has no config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(monkeypatch, run, "--autoencoders=kl,gan")
