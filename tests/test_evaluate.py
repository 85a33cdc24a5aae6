"""`tokenbridge evaluate --what generation|reference` and `import-metrics`, against numpy."""

import json

import numpy as np
import pytest
from evaluated import CLASSES, save_tiny, write_pictures
from PIL import Image
from scipy import linalg

from tokenbridge_jax import Pipeline
from tokenbridge_jax.commands import runner
from tokenbridge_jax.evaluation import generation, inception, networks, scores
from tokenbridge_jax.evaluation.features import SetFeatures
from tokenbridge_jax.evaluation.moments import gaussian

SETTINGS = {"num_iter": 3, "guidance": 2.0, "temperature": 0.9}
COUNT = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    save_tiny(folder / "model")
    write_pictures(folder / "real")
    return folder


def evaluate(folder, *flags: str) -> int:
    sampling = [f"--config.sampling.{name}={value}" for name, value in SETTINGS.items()]
    where = [f"--workdir={folder / 'model'}", "--config.sampling.batch_size=8"]
    return runner.run("evaluate", [*where, *sampling, "--features=thumbnails", *flags])


def generate(folder, *flags: str) -> int:
    what = ["--what=generation", f"--num_images={COUNT}", f"--reference={folder / 'real'}"]
    return evaluate(folder, *what, *flags)


def result_of(folder) -> dict:
    return json.loads((folder / "generation.json").read_text())


@pytest.fixture(scope="module")
def scored(folder):
    """The folder of the only generation there is."""
    assert generate(folder, "--write_samples") == 0
    (scored,) = (folder / "model" / "evaluation").iterdir()
    return scored


def means(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float64) / 255).reshape(len(images), -1)


def scipys_distance(one: np.ndarray, other: np.ndarray) -> float:
    mean, covariance = zip(*((x.mean(axis=0), np.cov(x.T)) for x in (one, other)), strict=True)
    # Singular covariances: their product's root has no unique form, but the trace has.
    values = linalg.eigvals(covariance[0] @ covariance[1]).real
    root = np.sqrt(np.maximum(values, 0)).sum()
    return ((mean[0] - mean[1]) ** 2).sum() + sum(map(np.trace, covariance)) - 2 * root


def test_samples_are_those_of_the_pipeline_and_scored_as_numpy_would(folder, scored, capsys):
    with np.load(scored / "samples.npz") as file:
        samples = dict(file)
    assert np.bincount(samples["labels"]).tolist() == [8, 7, 7]
    assert (np.diff(samples["labels"]) < 0).any()
    pipeline = Pipeline.load(folder / "model")
    again = pipeline.generate(samples["labels"].tolist(), seed=0, **SETTINGS)
    np.testing.assert_array_equal(samples["arr_0"], again.repeat(3, axis=-1))

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    result = result_of(scored)
    expected = scipys_distance(means(samples["arr_0"]), means(images))
    assert result["metrics"]["fid"] == pytest.approx(expected, rel=1e-5)
    facts = result["facts"]
    assert (facts["samples"], facts["seed"], facts["label_policy"]) == (COUNT, 0, "balanced")
    assert facts["sampling"]["num_iter"] == 3
    assert (facts["reference_images"], facts["image_size"]) == (40, 8)
    assert {"weights_sha256", "checkpoint_step", "rounding", "reference_sha256"} <= set(facts)
    assert any("22 samples have a singular covariance" in line for line in result["remarks"])

    # The same images given as a file, or the reference as its statistics: the same numbers.
    given = [f"--images={scored / 'samples.npz'}", f"--output={folder / 'given'}"]
    reference = ["--what=reference", f"--images={folder / 'real'}", f"--output={folder / 'ref'}"]
    assert evaluate(folder, *reference) == 0
    statistics = f"--reference={folder / 'ref' / 'reference_real.npz'}"
    assert evaluate(folder, "--what=generation", statistics, *given) == 0
    assert result_of(folder / "given")["metrics"] == result["metrics"]
    assert f"FID (lower)               {expected:>12.4f}" in capsys.readouterr().out


def test_a_stopped_run_goes_on(folder, scored, monkeypatch):
    before = {path.name: path.read_bytes() for path in scored.glob("*.npy")}
    metrics = result_of(scored)["metrics"]
    assert sorted(before) == [f"indices_{i:08d}.npy" for i in (0, 8, 16)]
    (scored / "indices_00000016.npy").unlink()
    drawn = []
    sample = generation.sample_indices
    monkeypatch.setattr(
        generation,
        "sample_indices",
        lambda *args, **kwargs: drawn.append(kwargs["first"]) or sample(*args, **kwargs),
    )
    assert generate(folder) == 0
    assert drawn == [16]
    assert {path.name: path.read_bytes() for path in scored.glob("*.npy")} == before
    assert result_of(scored)["metrics"] == metrics


def test_another_seed_has_samples_of_its_own(folder, scored):
    assert generate(folder, "--seed=1", "--labels=random") == 0
    (other,) = set((folder / "model" / "evaluation").iterdir()) - {scored}
    assert result_of(other)["facts"]["label_policy"] == "random"
    assert result_of(other)["metrics"]["fid"] != result_of(scored)["metrics"]["fid"]


@pytest.mark.parametrize("policy", generation.LABEL_POLICIES)
def test_labels_do_not_come_sorted(policy):
    labels = generation.make_labels(policy, 1000, CLASSES, seed=3)
    counts = np.bincount(labels)
    assert counts.sum() == 1000
    assert (np.ptp(counts) <= 1) == (policy == "balanced")
    parts = [np.bincount(part, minlength=CLASSES) for part in np.array_split(labels, 10)]
    assert np.min(parts) > 10


def test_sorted_files_are_remarked_on():
    """ADM's inception score of them is far off."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)).astype(np.float32)
    logits = 9 * np.eye(10, 1008, dtype=np.float32)[np.repeat(np.arange(10), 20)]
    keys = rng.permutation(200).astype(np.uint64)
    reference = scores.Reference(gaussian(features), None, None, {})
    said = {}
    for name, order in (("sorted", np.arange(200)), ("shuffled", rng.permutation(200))):
        found = SetFeatures(200, gaussian(features), None, features, logits[order], keys[order])
        result = scores.generation_scores(found, reference)
        said[name] = result, " ".join(scores.remarks(result, found, reference))
    assert said["sorted"][0]["inception_score"] == said["shuffled"][0]["inception_score"]
    assert said["sorted"][0]["inception_score_adm"] == pytest.approx(1, abs=1e-6)
    assert "ADM's inception score depends on the images' order: 1.00" in said["sorted"][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to measure: --what generation|"),
        (
            ["--what=generation", "--config.evaluation.reference="],
            "name what to compare with: --reference FILE",
        ),
        (["--what=generation", "--reference=none.npz"], "none.npz does not exist"),
        (["--what=generation", "--reference={}/empty"], "empty holds no pictures"),
        (["--what=generation", "--reference={}/mixed"], "mixed holds pictures of several sizes"),
        (["--what=generation", "--reference={}/wide.npz"], "statistics of 2048 features, not of"),
        (["--what=generation", "--reference={}/nan.npz"], "nan.npz: the statistics of the feat"),
        (["--what=generation", "--reference={}/one.npz"], "need at least 2 images, not 1"),
        (["--what=generation", "--num_images=0"], "--num_images=0 must be at least 1"),
        (
            ["--what=generation", "--features=inception", "--networks={}/empty"],
            "empty holds no Inception network: `tokenbridge import-metrics --help` says how",
        ),
        (["--what=reference", "--config.data.source=folder"], "--config.data.path is not set"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "mixed", count=2)
    write_pictures(tmp_path / "mixed" / "x", count=1)
    Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "x" / "000.png")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    flags = [flag.format(tmp_path) for flag in flags]
    assert evaluate(folder, *flags) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tokenbridge evaluate: error: ")
    assert message in error


# --- Networks -------------------------------------------------------------------------------------


def test_networks_are_imported_once(tmp_path, capsys):
    def imported(*flags: str) -> tuple[int, str]:
        status = runner.run("import-metrics", [f"--networks={tmp_path / 'networks'}", *flags])
        return status, capsys.readouterr().err

    assert "nothing to import" in imported()[1]
    assert "lpips_vgg needs --lpips_vgg FILE, too" in imported("--vgg16=x.npz")[1]
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    refused = imported(f"--inception={tmp_path / 'wrong.npz'}")[1]
    assert "wrong.npz is not the published file: its SHA-256 begins with" in refused
    refused = imported(f"--inception={tmp_path / 'wrong.npz'}", "--unpublished")[1]
    assert "these are not the weights of FID's Inception network" in refused
    assert not (tmp_path / "networks").exists()

    state = {"fc.weight": np.ones((1008, 2048), np.float32)}
    for name, conv, inputs in inception.convolutions():
        state[f"{name}.conv.weight"] = np.ones((conv.outputs, inputs, *conv.kernel), np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.bn.{part}"] = np.ones(conv.outputs, np.float32)
    np.savez(tmp_path / "x.npz", **state)
    assert imported(f"--inception={tmp_path / 'x.npz'}", "--unpublished") == (0, "")
    network = networks.load_network("inception", tmp_path / "networks")
    assert network.facts["inception_published"] is False
    assert len(network.facts["inception_sha256"]) == 64
    expected = inception.import_inception(state)
    np.testing.assert_array_equal(
        network.params["Mixed_6d.branch1x1"]["kernel"], expected["Mixed_6d.branch1x1"]["kernel"]
    )
    assert networks.load_network("lpips_vgg", tmp_path / "networks") is None
