"""The script that compares heads: its rows, the density of indices, and its table."""

import argparse
import dataclasses
import importlib
import sys

import numpy as np
import pytest
from checkout import LAUNCH
from token_shards import AUTOENCODER, write_workdir

from tokenbridge_jax.autoencoder import save_autoencoder
from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands.arguments import config_from
from tokenbridge_jax.data.loader import validation_batches
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import storage

sys.path.insert(0, str(LAUNCH))  # Scripts import from their own folder.
ablations, codebooks, heads, scripts = map(
    importlib.import_module, ("ablations", "codebooks", "heads", "scripts")
)
CODEBOOKS = {"vq": 1, "fsq": 4}  # Rows, and the channels of a position.
VQ = "bottleneck=vq", "codes=4096", "latent_channels=8"


@pytest.mark.parametrize("name", heads.ROWS)
def test_every_row_is_a_model_for_its_shards(name):
    store = "indices" if name in CODEBOOKS else "both"
    flags = [f"--config.{flag}" for flag in heads.ROWS[name]]
    config = config_from(["--config=cifar10", f"--config.tokenize.store={store}", *flags])
    model = make_model(config)
    assert model.head == config.model.head
    channels = CODEBOOKS.get(name, config.autoencoder.latent_channels)
    assert (model.channels, model.head_width) == (channels, 256)
    assert model.of_latents == (name in {"diffusion", "flow", "mixture"})
    assert model.has_probabilities == (name not in {"diffusion", "flow", "masked_confidence"})


def test_rows_of_a_codebook_get_an_autoencoder_and_shards_of_their_own(tmp_path, monkeypatch):
    run, calls = tmp_path / "run", []
    storage.write_json(run / "config.json", {})
    save_autoencoder(run / "autoencoder", AUTOENCODER, {}, {"step": 7})

    def record(command, folder, *flags):
        calls.append((command, folder.name, flags))
        if command == "train-vae":
            codebook = dataclasses.replace(AUTOENCODER, bottleneck="vq")
            save_autoencoder(folder / "autoencoder", codebook, {})

    monkeypatch.setattr(heads, "run_logged", record)
    monkeypatch.setattr(codebooks, "run_logged", record)
    comparison = heads.Comparison(run, tmp_path / "w", 1.0, 1, 1, ("--config.seed=3",))
    for name in ("flow", "vq", "channel_ar_16_levels"):
        tokens = heads.tokenize(comparison, name)
        (tokens / "tokens").mkdir()
        folder = comparison.folder(name, tokens)
        for part in ("autoencoder", "tokens"):
            assert (folder / part).resolve() == (tokens / part).resolve()
        own = (tokens / "autoencoder").resolve() != run / "autoencoder"
        assert own == (name == "vq")
    vq = tuple(f"--config.autoencoder.{x}" for x in VQ)
    both, seed = "--config.tokenize.store=both", "--config.seed=3"
    where = "tokens-" + "-".join(VQ)
    assert calls == [
        ("tokenize", "tokens", (both, seed)),
        ("train-vae", where, ("--config.vae_training.steps=7", *vq, seed)),
        ("tokenize", where, ("--config.tokenize.store=indices", *vq, seed)),
        ("tokenize", "tokens-levels=16", (both, "--config.quantizer.levels=16", seed)),
    ]


def test_the_density_of_indices_knows_the_width_of_their_cells(tmp_path):
    write_workdir(tmp_path)
    key = "val_nll_bits_per_index"
    storage.write_bytes(tmp_path / "metrics.jsonl", b'{"step": 1, "%s": 3.5}\n' % key.encode())
    info = heads.shards.read_info(tmp_path / "tokens")
    assert isinstance(info.quantizer, Quantizer)
    # By counting the latents of a fine grid that become each index.
    grid = np.linspace(info.quantizer.minimum, info.quantizer.maximum, 1_000_001)[:-1]
    counts = np.bincount(np.asarray(info.quantizer.quantize(grid)), minlength=info.quantizer.levels)
    widths = counts / len(grid) * (info.quantizer.maximum - info.quantizer.minimum)
    batches = validation_batches(tmp_path / "tokens", 4, split="validation")
    indices = np.concatenate([batch["indices"][batch["weights"] > 0] for batch in batches])
    expected = 3.5 + np.mean(np.log2(widths)[indices])
    found = heads.likelihood(tmp_path)
    assert found["density_bits"] == pytest.approx(expected, abs=1e-3)
    assert found["image_bits"] == 3.5 * 4 * 4 * 3

    # The same indices of a trained codebook have no such intervals.
    codebook = dataclasses.replace(info.autoencoder, bottleneck="fsq")
    heads.shards.write_info(
        tmp_path / "tokens", dataclasses.replace(info, autoencoder=codebook, posterior_samples=0)
    )
    assert heads.likelihood(tmp_path) == {"density_bits": None, "image_bits": 168.0}


def test_latents_have_their_density_and_some_heads_have_none(tmp_path):
    for metrics, bits in ((b'"val_nll_bits_per_latent": -1.25', -1.25), (b'"val_loss": 1.0', None)):
        storage.write_bytes(tmp_path / "metrics.jsonl", b'{"step": 1, %s}\n' % metrics)
        assert heads.likelihood(tmp_path) == {"density_bits": bits, "image_bits": None}


def test_the_table_has_means_errors_and_what_was_chosen(tmp_path):
    run = dict.fromkeys(heads.MEASURES, 1.0) | {"guidance": 3.0, "temperature": 0.9}
    better = run | {"frechet_distance_64": 2.0, "guidance": 1.5}
    rows = [
        {"name": "flow", "runs": [run | {"density_bits": None}]},
        {"name": "mixture", "runs": [run, better]},
    ]
    flow, mixture = heads.table(rows).splitlines()[2:]
    cells = [cell.strip() for cell in mixture.split("|")[1:-1]]
    assert cells[:3] == ["`mixture`", "3, 0.9; 1.5, 0.9", "1.50 ± 0.50"]
    assert cells[-1] == "1"
    assert flow.split("|")[7].strip() == "-"

    for row in rows:
        images = np.zeros((20, 8, 8, 3), np.uint8)
        storage.write_npz(tmp_path / f"{row['name']}-seed0" / "shown.npz", {"images": images})
    heads.draw(tmp_path, rows)
    assert (tmp_path / "heads.png").stat().st_size > 1000


def test_a_folder_without_a_run_is_named(tmp_path, monkeypatch, capsys):
    argv = ["heads.py", f"--run={tmp_path}", f"--workdir={tmp_path / 'w'}"]
    monkeypatch.setattr(sys, "argv", argv)
    assert scripts.run_script(heads.main) == 2
    assert capsys.readouterr().err.startswith(f"heads.py: error: {tmp_path} has no config.json")
    wrong = {
        "--heads=channel_ar,gan": "there is no row 'gan'; the rows are channel_ar, ",
        "--steps=1": "--steps=1 is no argument of this script; settings are --config.section",
    }
    for argument, message in wrong.items():
        monkeypatch.setattr(sys, "argv", [*argv, argument])
        with pytest.raises(SystemExit):
            heads.main()
        assert message in capsys.readouterr().err


def test_nothing_is_written_before_settings_and_run_are_right(tmp_path, monkeypatch, capsys):
    run, workdir = tmp_path / "run", tmp_path / "w"
    storage.write_json(run / "config.json", config_from(["--config=cifar10"]).to_dict())
    argv = ["heads.py", f"--run={run}", f"--workdir={workdir}", "--seeds=0"]
    for flags, message in (
        (["--config.model.widht=3"], "widht"),
        ([], f"{run} has no autoencoder: finish launch/cifar10.sh first"),
    ):
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        assert scripts.run_script(heads.main) == 2
        assert message in capsys.readouterr().err
        assert not workdir.exists()


def test_rows_are_named_once_and_may_have_spaces():
    parser = argparse.ArgumentParser()
    assert ablations.row_names(parser, "vq, fsq,vq", [], heads.ROWS) == ["vq", "fsq"]
