"""The script that compares heads: its rows, the density of indices, and its table."""

import importlib
import sys

import numpy as np
import pytest
from checkout import LAUNCH
from token_shards import write_workdir

from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands.arguments import config_from
from tokenbridge_jax.data.loader import validation_batches
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import storage

sys.path.insert(0, str(LAUNCH))  # Scripts import from their own folder.
heads = importlib.import_module("heads")


@pytest.mark.parametrize("name", heads.ROWS)
def test_every_row_is_a_model_for_shards_of_both(name):
    flags = [f"--config.{flag}" for flag in heads.ROWS[name]]
    config = config_from(["--config=cifar10", "--config.tokenize.store=both", *flags])
    model = make_model(config)
    assert model.head == config.model.head
    assert (model.channels, model.head_width) == (4, 256)
    assert model.of_latents == (name in {"diffusion", "flow", "mixture"})
    assert model.has_probabilities == (name not in {"diffusion", "flow", "masked_confidence"})


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
    assert heads.density_bits(tmp_path) == pytest.approx(expected, abs=1e-3)


def test_latents_have_their_density_and_some_heads_have_none(tmp_path):
    for metrics, bits in ((b'"val_nll_bits_per_latent": -1.25', -1.25), (b'"val_loss": 1.0', None)):
        storage.write_bytes(tmp_path / "metrics.jsonl", b'{"step": 1, %s}\n' % metrics)
        assert heads.density_bits(tmp_path) == bits


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
    assert heads.main() == 2
    assert capsys.readouterr().err.startswith(f"heads.py: error: {tmp_path} is no workdir of ")
    monkeypatch.setattr(sys, "argv", [*argv, "--heads=channel_ar,gan"])
    with pytest.raises(SystemExit):
        heads.main()
    assert "gan is neither --config.section.key=value nor one of" in capsys.readouterr().err
