"""`tokenbridge evaluate generation|reference` and `import-metrics`, against numpy."""

import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from evaluated import CLASSES, save_tiny, write_pictures
from PIL import Image
from scipy import linalg

from tokenbridge_jax import Pipeline
from tokenbridge_jax.commands import runner
from tokenbridge_jax.evaluation import generation, inception, networks, scores
from tokenbridge_jax.evaluation.features import SetFeatures, ThumbnailExtractor
from tokenbridge_jax.evaluation.moments import gaussian
from tokenbridge_jax.runtime.errors import UserError

SETTINGS = {"num_iter": 3, "guidance": 2.0, "temperature": 0.9}
COUNT = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    save_tiny(folder / "model")
    write_pictures(folder / "real")
    return folder


def evaluate(folder, word: str, *flags: str) -> int:
    sampling = [f"--config.sampling.{name}={value}" for name, value in SETTINGS.items()]
    where = [f"--workdir={folder / 'model'}", "--config.sampling.batch_size=8"]
    features = ["--features=thumbnails"] * (word in ("generation", "reconstruction", "reference"))
    return runner.run("evaluate", [word, *where, *sampling, *features, *flags])


def generate(folder, *flags: str) -> int:
    what = [f"--num_images={COUNT}", f"--reference={folder / 'real'}"]
    return evaluate(folder, "generation", *what, *flags)


def results_of(folder) -> list[dict]:
    paths = sorted(folder.glob("generation_*/result.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def scored(folder):
    """The folder of the first samples."""
    assert generate(folder, "--write_samples") == 0
    (scored,) = (folder / "model" / "evaluation").glob("samples_*")
    return scored


def means(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float64) / 255).reshape(len(images), -1)


def scipys_distance(one: np.ndarray, other: np.ndarray) -> float:
    mean, covariance = zip(*((x.mean(axis=0), np.cov(x.T)) for x in (one, other)), strict=True)
    # The square root of a product of singular covariances is not unique, but its trace is.
    values = linalg.eigvals(covariance[0] @ covariance[1]).real
    root = np.sqrt(np.maximum(values, 0)).sum()
    return ((mean[0] - mean[1]) ** 2).sum() + sum(map(np.trace, covariance)) - 2 * root


def test_samples_are_those_of_the_pipeline_with_scores_as_from_numpy(folder, scored, capsys):
    with np.load(scored / "samples.npz") as file:
        samples = dict(file)
    assert np.bincount(samples["labels"]).tolist() == [7, 7, 8]
    assert (np.diff(samples["labels"]) < 0).any()
    pipeline = Pipeline.load(folder / "model")
    again = pipeline.generate(samples["labels"].tolist(), seed=0, **SETTINGS)
    np.testing.assert_array_equal(samples["arr_0"], again.repeat(3, axis=-1))

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    (result,) = results_of(folder / "model" / "evaluation")
    expected = scipys_distance(means(samples["arr_0"]), means(images))
    assert result["metrics"]["thumbnail_distance"] == pytest.approx(expected, rel=1e-5)
    facts = result["facts"]
    assert (facts["samples"], facts["seed"], facts["label_policy"]) == (COUNT, 0, "balanced")
    assert facts["sampling"]["num_iter"] == 3
    assert (facts["reference_images"], facts["image_size"]) == (40, "8x8")
    assert {"weights_sha256", "checkpoint_step", "rounding", "reference_sha256"} <= set(facts)
    assert any("22 samples have a singular covariance" in line for line in result["remarks"])

    # The same images from a file, and the reference from its statistics: the same numbers.
    given = [f"--images={scored / 'samples.npz'}", f"--output={folder / 'given'}"]
    reference = ["reference", f"--images={folder / 'real'}", f"--output={folder / 'ref'}"]
    assert evaluate(folder, *reference) == 0
    statistics = f"--reference={folder / 'ref' / 'reference_real_thumbnails.npz'}"
    assert evaluate(folder, "generation", statistics, *given) == 0
    (given_result,) = results_of(folder / "given")
    assert given_result["metrics"] == result["metrics"]
    assert given_result["facts"]["reference_of"] == "real"
    table = f"thumbnail distance (lower)      {expected:>12.4f}"
    assert table in capsys.readouterr().out
    with Image.open(scored / "samples.png") as picture:
        assert picture.size[0] > 400


def test_a_stopped_run_continues(folder, scored, monkeypatch, capsys):
    """Fewer samples are the first of the stored ones."""
    before = {path.name: path.read_bytes() for path in scored.glob("*.npy")}
    (metrics,) = (result["metrics"] for result in results_of(folder / "model" / "evaluation"))
    assert sorted(before) == [f"indices_{i:08d}.npy" for i in (0, 8, 16)]
    (scored / "indices_00000016.npy").unlink()
    drawn = []
    sample = generation.start_batches
    monkeypatch.setattr(
        generation,
        "start_batches",
        lambda *args, **kwargs: drawn.extend(kwargs["numbers"]) or sample(*args, **kwargs),
    )
    assert generate(folder) == 0
    assert drawn == [*range(16, 22)]
    assert "holds 16 samples: continuing from there" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in scored.glob("*.npy")} == before
    (again,) = results_of(folder / "model" / "evaluation")
    assert again["metrics"] == metrics
    for count in (22, 9):
        capsys.readouterr()
        assert generate(folder, f"--num_images={count}") == 0
        lines = capsys.readouterr().err.splitlines()
        assert f"{scored} holds 22 samples, {count} are asked for: nothing to draw" in lines
        assert not [line for line in lines if line.startswith("sample ")]  # Progress.
    assert drawn == [*range(16, 22)]
    assert results_of(folder / "model" / "evaluation")[-1]["facts"]["samples"] == 9


def test_samples_that_differ_have_their_own_folder(folder, scored, tmp_path):
    evaluation = folder / "model" / "evaluation"
    assert generate(folder, "--seed=1", "--labels=random") == 0
    assert results_of(evaluation)[-1]["facts"]["label_policy"] == "random"
    # The same weights, but another model.
    shutil.copytree(folder / "model", tmp_path / "model")
    described = json.loads((folder / "model" / "model.json").read_text())
    described["model"]["channel_order"] = described["model"]["channel_order"][::-1]
    (tmp_path / "model" / "model.json").write_text(json.dumps(described))
    assert generate(tmp_path, f"--reference={folder / 'real'}", f"--output={evaluation}") == 0
    folders = sorted(evaluation.glob("samples_*"))
    assert len(folders) == 3
    drawn = [np.load(path / "indices_00000000.npy") for path in folders]
    assert all((a != b).any() for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("policy", generation.LABEL_POLICIES)
def test_labels_are_not_sorted_and_more_labels_begin_with_fewer(policy):
    labels = generation.make_labels(policy, 1000, CLASSES, seed=3)
    counts = np.bincount(labels)
    assert counts.sum() == 1000
    assert (np.ptp(counts) <= 1) == (policy == "balanced")
    parts = [np.bincount(part, minlength=CLASSES) for part in np.array_split(labels, 10)]
    assert np.min(parts) > 10
    np.testing.assert_array_equal(labels[:31], generation.make_labels(policy, 31, CLASSES, 3))


def test_a_remark_warns_of_sorted_files():
    """Their inception score in ADM's way is far too low."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)).astype(np.float32)
    logits = 9 * np.eye(10, 1008, dtype=np.float32)[np.repeat(np.arange(10), 20)]
    keys = rng.permutation(200).astype(np.uint64)
    reference = scores.Reference(gaussian(features), None, None, {})
    results = []
    for order in (np.arange(200), rng.permutation(200)):
        found = SetFeatures(200, gaussian(features), None, features, logits[order], keys[order])
        result = scores.generation_scores(found, reference)
        results.append((result, " ".join(scores.remarks(result, found, reference, {}))))
    (ordered, warned), (shuffled, unwarned) = results
    assert ordered == pytest.approx(shuffled)
    assert "these images are sorted, and ADM's inception score depends on" in warned
    assert "these images are sorted" not in unwarned


def test_a_reference_of_another_network_is_refused(tmp_path):
    features = np.random.default_rng(0).normal(size=(9, 192)).astype(np.float32)
    extractor = ThumbnailExtractor()
    reference = scores.Reference(gaussian(features), None, features, {"reference": "pictures"})
    scores.save_reference(tmp_path / "x.npz", reference, extractor)
    found = scores.find_reference(tmp_path / "x.npz", None, extractor)
    assert found.facts["reference"] == "x.npz"
    extractor.facts = extractor.facts | {"features": "others"}
    with pytest.raises(UserError, match="was made with features pixels of 8 x 8"):
        scores.find_reference(tmp_path / "x.npz", None, extractor)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--what=tokens", "--what is now a word: tokenbridge evaluate tokens [flags]"),
        ("--seed=1 --what generation", "--what is now a word: tokenbridge evaluate generation [fl"),
        ("--seed=1", "name one: tokenbridge evaluate generation|features|reconstruction|"),
        ("everything", "there is no 'everything'; name one: tokenbridge evaluate generation|"),
        ("generation --config.evaluation.reference=", "name what to compare with: --reference FI"),
        ("generation --reference=none.npz", "--reference none.npz does not exist; it"),
        ("generation --reference={}/empty", "empty holds no pictures"),
        ("generation --reference={}/mixed", "mixed holds pictures of several sizes"),
        ("generation --reference={}/wide.npz", "statistics of 2048 features, not of 192"),
        ("generation --reference={}/nan.npz", "nan.npz: the statistics of the features contain"),
        ("generation --reference={}/one.npz", "one.npz: statistics need at least 2 "),
        ("generation --num_images=0", "--num_images=0 must be at least 2"),
        (
            "generation --features=inception --networks={}/empty",
            "empty holds no Inception network: `tokenbridge import-metrics --help` says how",
        ),
        ("reference --config.data.source=folder", "--config.data.path is not set"),
        ("generation --reference={}/cut.npz", "cut.npz cannot be read: "),
        ("generation --reference={}/text.npz", "it is damaged, or not a .npz file of numbers"),
        ("generation --reference={}/words.npz", "mu and sigma must be numbers"),
        ("generation --reference={}/skew.npz", "skew.npz: the covariance is not symmetric"),
        ("generation --reference={}/minus.npz", "sigma has negative eigenvalues"),
        ("generation --reference=data --seed=-1", "--seed=-1 must be from 0"),
        ("generation --batch_size=0", "--batch_size=0 must be at least 1"),
        ("likelihood --images=x", "--images belongs to `tokenbridge evaluate generation|recon"),
        ("generation --noall_views", "--noall_views belongs to `tokenbridge evaluate tokens`"),
        ("generation --images=x --step=3", "--step applies to new samples"),
        ("reconstruction --perturb=1", "--perturb=1 must be SHARE:LEVELS"),
        ("reconstruction --levels=a", "--levels=a must be numbers"),
    ],
)
def test_mistakes_give_one_line(folder, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "mixed", count=2)
    write_pictures(tmp_path / "mixed" / "x", count=1)
    Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "x" / "000.png")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez(tmp_path / "words.npz", mu=np.array(["a"]), sigma=np.eye(1))
    np.savez(tmp_path / "skew.npz", mu=np.zeros(192), sigma=np.triu(np.ones((192, 192))))
    np.savez(tmp_path / "minus.npz", mu=np.zeros(192), sigma=np.diag([-9.0, *[1.0] * 191]))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wide.npz").read_bytes()[:5000])
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    assert evaluate(folder, *flags.format(tmp_path).split()) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tokenbridge evaluate: error: ")
    assert message in error


def test_help_lists_the_words_and_the_flags_of_a_word(capsys):
    assert runner.run("evaluate", ["--help"]) == runner.run("evaluate", ["tokens", "--help"]) == 0
    both = capsys.readouterr().out
    assert both.count("likelihood      bits per index") == 2
    assert both.count("--[no]all_views") == 1
    assert "--levels" not in both


def test_a_name_that_is_too_long_is_refused_before_measuring(folder, tmp_path, capsys):
    images = tmp_path / ("x" * 240)
    write_pictures(images, 2)
    assert evaluate(folder, "reference", f"--images={images}", f"--output={tmp_path}") == 2
    assert "bytes, a file's at most 255" in capsys.readouterr().err


# --- Networks -------------------------------------------------------------------------------------


def test_without_a_home_only_features_of_networks_are_refused(tmp_path, monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME", networks.FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # No user has this number.
    assert networks.default_folder() is None
    assert networks.load_network("lpips_vgg", None) is None
    assert networks.make_extractor("thumbnails", None).name == "thumbnails"
    with pytest.raises(UserError, match="set TOKENBRIDGE_NETWORKS to one; --features thumbnails"):
        networks.make_extractor("inception", None)
    assert runner.run("import-metrics", ["--inception=x.pth"]) == 2
    assert "this user has no home: name one by --networks" in capsys.readouterr().err
    monkeypatch.setenv(networks.FOLDER_VARIABLE, str(tmp_path))
    assert networks.default_folder() == tmp_path
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(networks.FOLDER_VARIABLE, "~/nets")
    assert str(networks.default_folder()) == "/home/me/nets"


def test_networks_are_imported_once(tmp_path, capsys):
    def imported(*flags: str) -> tuple[int, str]:
        status = runner.run("import-metrics", [f"--networks={tmp_path / 'networks'}", *flags])
        return status, capsys.readouterr().err

    assert "nothing to import" in imported()[1]
    needed = "LPIPS needs two files: --vgg16 FILE and --lpips_vgg FILE"
    assert needed in imported("--vgg16=x.npz")[1]
    for content, what in (
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("<!DOCTYPE html>", "web page"),
    ):
        (tmp_path / "x.pth").write_text(content)
        status, error = imported(f"--vgg16={tmp_path / 'x.pth'}", f"--lpips_vgg={tmp_path / 'y'}")
        assert (status, len(error.splitlines())) == (2, 1)
        assert f"x.pth cannot be read: it is a {what}" in error
    np.savez(tmp_path / "wrong.npz", x=np.zeros(3))
    refused = imported(f"--inception={tmp_path / 'wrong.npz'}")[1]
    assert "wrong.npz is not the published file: its SHA-256 begins with" in refused
    refused = imported(f"--inception={tmp_path / 'wrong.npz'}", "--unpublished")[1]
    assert "these are not the weights of FID's Inception network" in refused
    assert not (tmp_path / "networks").exists()

    shapes = inception.tensor_shapes()
    state = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "x.npz", **state)
    assert imported(f"--inception={tmp_path / 'x.npz'}", "--unpublished") == (0, "")
    network = networks.load_network("inception", tmp_path / "networks")
    assert network.facts["inception_published"] is False
    assert len(network.facts["inception_sha256"]) == 64
    expected = inception.import_inception(state)
    jax.tree.map(np.testing.assert_array_equal, network.params, expected)
    assert networks.load_network("lpips_vgg", tmp_path / "networks") is None
