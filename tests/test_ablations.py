"""The ablation script's results: densities, tables, pairs; its processes."""

import os
import runpy
import sys

import numpy as np
import pytest
from checkout import LAUNCH

from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime.errors import UserError

sys.path.insert(0, str(LAUNCH))  # Scripts import from their own folder.
SCRIPT = runpy.run_path(str(LAUNCH / "ablations.py"))


@pytest.mark.parametrize("levels", [2, 5, 32])
def test_cells_are_the_latents_of_a_level(levels: int):
    quantizer = Quantizer.gaussian(levels, 4.0)
    latents = (np.arange(400_000) + 0.5) / 400_000 * 8 - 4
    shares = np.bincount(np.asarray(quantizer.quantize(latents)), minlength=levels) / 400_000
    for level in range(levels):
        width = 2 ** SCRIPT["mean_log2_cell"](quantizer, np.array([[level]]))
        assert width == pytest.approx(8 * shares[level], abs=1e-4)
    # For a uniform density, the result is log2 of the range for any number of levels.
    indices = np.asarray(quantizer.quantize(latents))
    log2_p = np.log2(shares[indices]).mean()
    assert -log2_p + SCRIPT["mean_log2_cell"](quantizer, indices) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("status", [75, 130, 143])
def test_a_command_that_was_told_to_stop_has_not_failed(tmp_path, monkeypatch, status: int):
    monkeypatch.setattr(SCRIPT["runner"], "run", lambda *_: status)
    with pytest.raises(UserError, match="stopped; the same command continues"):
        SCRIPT["run_logged"]("sample", tmp_path)


def test_processes_share_the_cores(monkeypatch):
    name = "OPENBLAS_NUM_THREADS"
    monkeypatch.setenv(name, "")  # So that its value of before comes back at the end.
    monkeypatch.delenv(name)
    monkeypatch.setitem(SCRIPT["processes"].__globals__, "host_cores", lambda: 7)
    with SCRIPT["processes"](2) as pool:
        assert pool.submit(os.getenv, name).result() == "3"


def _row(name: str, fid: float | None, density: list[float], distance: list[float]) -> dict:
    fixed = {"levels": 8, "head": "16x2", "head_parameters": 12345, "bits_per_index": 2.0}
    runs = [
        fixed | {"density_bits": a, "frechet_distance": b}
        for a, b in zip(density, distance, strict=True)
    ]
    return {"name": name, "table": "levels", "paper_fid": fid, "runs": runs}


def test_pairs_and_tables():
    rows = [
        _row("one", 1.0, [1.0, 1.1], [0.5, 0.6]),
        _row("two", 2.0, [2.0, 2.1], [0.3, 0.4]),
        _row("three", 3.0, [1.9, 2.2], [0.1, 0.2]),
        _row("no figure", None, [9.0, 9.1], [9.0, 9.1]),
    ]
    assert list(SCRIPT["pairs"](rows, "density_bits").values()) == [2, 0, 1]
    assert list(SCRIPT["pairs"](rows, "frechet_distance").values()) == [0, 3, 0]
    assert SCRIPT["mean_and_error"](rows[0], "density_bits") == pytest.approx((1.05, 0.05))
    # With one seed, every pair is undecided.
    single = [row | {"runs": row["runs"][:1]} for row in rows]
    assert list(SCRIPT["pairs"](single, "density_bits").values()) == [0, 0, 3]

    real = {"images": 10, "frechet_distance_of_halves": 0.25}
    text = SCRIPT["tables"]({"rows": rows, "real": real, "levels": []})
    row = "| `one` | 8 | 16x2 | 12,345 | 2.000 ± 0.000 | 1.050 ± 0.050 | 0.55000 ± 0.05000 | 1.0 |"
    assert row in text
    assert "Pairs by density, bits: 2 as in the paper, 1 undecided." in text
    assert "Pairs by Frechet distance: 3 the other way round." in text
    assert "| `no figure` |" in text
