"""`launch/colab.ipynb` runs from top to bottom with small sizes, and is stored without outputs."""

import json

import numpy as np
import pytest
from checkout import LAUNCH, ROOT

from tokenbridge_jax.training.metric_writer import read_metrics

NOTEBOOK = LAUNCH / "colab.ipynb"
SETTINGS = """
FLAGS = [
    "--config.data.image_size=8",
    "--config.autoencoder.channels=8",
    "--config.autoencoder.multipliers=(1,1)",
    "--config.autoencoder.latent_channels=4",
    "--config.vae_training.steps=30",
    "--config.vae_training.warmup_steps=3",
    "--config.vae_training.log_every=5",
    "--config.tokenize.posterior_samples=1",
    *(f"--config.model.{part}_width=16" for part in ("encoder", "decoder", "head")),
    *(f"--config.model.{part}_layers=1" for part in ("encoder", "decoder", "head")),
    "--config.training.steps=30",
    "--config.training.warmup_steps=3",
    "--config.training.log_every=5",
    "--config.training.eval_every=10",
    "--config.training.sample_every=0",
]
STEPS = 2
"""


@pytest.fixture(scope="module")
def stored():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_it_is_stored_without_outputs(stored):
    assert stored["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in stored["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    text = json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
    assert NOTEBOOK.read_text(encoding="utf-8") == text


@pytest.mark.filterwarnings("ignore")  # The libraries that run notebooks warn.
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install '.[notebook]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[notebook]'")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    places = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())]
    notebook.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(SETTINGS))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()

    # The notebook itself checks that saved and imported weights give the same samples.
    workdir = tmp_path / "runs" / "notebook"
    for name in ("model.json", "tokens/dataset.json", "pretrained/model.safetensors"):
        assert (workdir / name).exists()
    assert (workdir / "imported" / "model.json").exists()
    for folder in (workdir / "autoencoder" / "training", workdir):
        losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
        assert np.mean(losses[-2:]) < losses[0]
    pictured = {
        cell.id
        for cell in notebook.cells
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    }
    assert pictured == {
        *("train-vae", "quantization", "maps", "train", "sample", "play", "orders"),
        *("confidence", "edit", "mixture"),
    }
