"""Likelihoods against brute force over all images and `Pipeline.log_probs`; calibration."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_reconstruction as reconstructing
from evaluated import assert_json_and_plots
from jobs import start_job
from tiny_model import AUTOENCODER, random_batch, random_params, tiny
from token_shards import random_records, write_tokens

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import init_params as init_autoencoder
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.data import shards
from tokenbridge_jax.evaluation import likelihood as module
from tokenbridge_jax.evaluation import tokens
from tokenbridge_jax.evaluation.calibration import Calibration
from tokenbridge_jax.evaluation.likelihood import Scorer, likelihood
from tokenbridge_jax.evaluation.reconstruction import reconstruction
from tokenbridge_jax.model import init_params
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.sampling.orders import random_orders

# A model for the shards of `token_shards.write_tokens`.
CONFIG = tiny(
    positions=16,
    channel_order=(2, 0, 1),
    quantizer=Quantizer.gaussian(16),
    first_token_quirk=True,
)
SETTINGS = dict(num_iter=5, num_orders=2, seed=3)


def make_pipeline(mesh, params=None) -> Pipeline:
    """A model with random weights on a mesh."""
    boxed = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    params = random_params(CONFIG, spread=0.2) if params is None else params
    placed = jax.device_put(jax.device_get(params), meshes.logical_shardings(boxed, mesh))
    local = meshes.make_mesh(devices=jax.local_devices()[:1])
    weights = init_autoencoder(AUTOENCODER, jax.random.key(0))
    codec = Codec(AUTOENCODER, weights, CONFIG.quantizer, local)
    description = ModelDescription(CONFIG, ("cat", "dog", "owl"), "0" * 64)
    return Pipeline(description, placed, codec, mesh)


@pytest.fixture(scope="module")
def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def pipeline(one_device):
    return make_pipeline(one_device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, {"train": [9], "validation": [4, 7]}, samples=2)
    return folder


@pytest.fixture(scope="module")
def found(pipeline, folder):
    return likelihood(pipeline, folder, **SETTINGS, batch_size=11)


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_iter", [1, 2])
def test_probabilities_of_all_images_sum_to_one(num_iter, one_device):
    config = tiny(positions=2, channel_order=(1, 0), quantizer=Quantizer.gaussian(3))
    images = np.array(list(itertools.product(range(3), repeat=4)), np.uint8).reshape(81, 2, 2)
    cases = list(itertools.product(([0, 1], [1, 0]), (0, 2)))
    scores = Scorer(config, one_device, num_iter)(
        random_params(config),
        np.tile(images, (len(cases), 1, 1)),
        np.repeat(np.array([label for _, label in cases], np.int32), 81),
        np.repeat(np.array([order for order, _ in cases], np.int32), 81, axis=0),
    )
    probabilities = np.exp(-scores.nll.astype(np.float64).sum(axis=(1, 2))).reshape(-1, 81)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    # The probability of an image depends on the order, unless all is revealed in one step.
    assert np.allclose(probabilities[0], probabilities[2], rtol=1e-4) == (num_iter == 1)


def test_steps_are_those_of_log_probs(pipeline, one_device):
    batch = random_batch(CONFIG, 3, seed=4)
    indices, labels, orders = batch["indices"], batch["labels"], batch["order"]
    scorer = Scorer(CONFIG, one_device, 5)
    scores = scorer(pipeline.params, indices, labels, orders)
    assert scorer.hidden == (16, 15, 12, 9, 4, 0)
    for now, after in itertools.pairwise(scorer.hidden):
        hidden = np.argsort(orders, axis=1) < now
        expected = pipeline.log_probs(indices, labels.tolist(), hidden=hidden)
        revealed = np.take_along_axis(expected, orders[:, after:now, None], axis=1)
        np.testing.assert_allclose(-scores.nll[:, after:now], revealed, atol=2e-5)


def test_confidence_and_probability_of_lower_levels(pipeline, one_device):
    """For all levels of the last channel, at the position that is revealed last."""
    levels, batch = CONFIG.levels, random_batch(CONFIG, 1)
    indices = np.repeat(batch["indices"], levels, axis=0)
    order, channel = np.arange(16, dtype=np.int32), CONFIG.channel_order[-1]
    indices[:, 0, channel] = np.arange(levels)
    scores = Scorer(CONFIG, one_device, 16)(
        pipeline.params, indices, np.repeat(batch["labels"], levels), np.tile(order, (levels, 1))
    )
    found = scores._replace(**{k: v[:, 0, channel] for k, v in scores._asdict().items()})
    probabilities = np.exp(-found.nll)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found.confidence, probabilities.max(), rtol=1e-5)
    np.testing.assert_array_equal(found.correct, np.arange(levels) == probabilities.argmax())
    np.testing.assert_allclose(found.below, np.cumsum(probabilities) - probabilities, atol=1e-5)


# --- Reports --------------------------------------------------------------------------------------


def test_one_step_is_the_mean_of_log_probs(pipeline, folder):
    found = likelihood(pipeline, folder, num_iter=1)
    records = random_records(shards.read_info(folder), range(11))
    bits = -pipeline.log_probs(records["indices"][:, 0], records["label"].tolist()) / np.log(2)
    of_image = bits.astype(np.float64).mean(axis=(1, 2))
    assert (found["split"], found["images"], found["steps"]) == ("validation", 11, 1)
    assert found["first_token_quirk"]
    assert "with the first-token quirk:" in module.table(found)
    assert found["bits_per_index"] == pytest.approx(of_image.mean(), rel=1e-6)
    error = of_image.std(ddof=1) / 11**0.5
    assert found["bits_per_index_standard_error"] == pytest.approx(error, rel=1e-5)
    np.testing.assert_allclose(found["by_channel"], bits.mean(axis=(0, 1)), rtol=1e-5)
    by_position = bits.mean(axis=(0, 2)).reshape(4, 4)
    np.testing.assert_allclose(found["by_position"], by_position, rtol=1e-5)
    assert found["by_step"]["bits_per_index"] == pytest.approx([found["bits_per_index"]])
    # 48 indices of 4 bits for 256 pixels.
    assert (found["raw_bits_per_index"], found["raw_bits_per_pixel"]) == (4, 0.75)
    assert found["bits_per_pixel"] == pytest.approx(found["bits_per_index"] * 48 / 256)


def test_means_over_parts_agree(found):
    mean = found["bits_per_index"]
    assert np.mean(found["by_channel"]) == pytest.approx(mean, rel=1e-12)
    assert np.mean(found["by_position"]) == pytest.approx(mean, rel=1e-12)
    steps = found["by_step"]
    assert (steps["visible"], steps["revealed"]) == ([0, 1, 4, 7, 12], [1, 3, 3, 5, 4])
    assert np.average(steps["bits_per_index"], weights=steps["revealed"]) == pytest.approx(mean)
    assert sum(found["calibration"]["bins"]["count"]) == 11 * 2 * 48
    assert sum(found["calibration"]["pit"]) == pytest.approx(1)


def test_seeds_determine_the_orders(pipeline, folder, found):
    """The result for two orders is the mean of the results for each; image i has its own order."""
    alone = [likelihood(pipeline, folder, num_iter=5, seed=seed) for seed in (3, 4)]
    mean = np.mean([one["bits_per_index"] for one in alone])
    assert found["bits_per_index"] == pytest.approx(mean, rel=1e-6)
    records = random_records(shards.read_info(folder), range(11))
    orders = np.asarray(random_orders(4, jnp.arange(11), 16))
    scores = Scorer(CONFIG, pipeline.mesh, 5)(
        pipeline.params, records["indices"][:, 0], records["label"], orders
    )
    bits = scores.nll.mean() / np.log(2)
    assert alone[1]["bits_per_index"] == pytest.approx(bits, rel=1e-6)


def assert_alike(found, expected) -> None:
    """Equal except for float32 rounding, which may move a confidence to the next bin."""
    flat = [jax.tree.flatten({**x, "calibration": None}) for x in (found, expected)]
    assert flat[0][1] == flat[1][1]
    for ours, theirs in zip(flat[0][0], flat[1][0], strict=True):
        assert ours == (theirs if isinstance(theirs, str) else pytest.approx(theirs, rel=1e-4))
    ours, theirs = found["calibration"], expected["calibration"]
    for name in ("accuracy", "confidence", "expected_calibration_error", "pit"):
        assert ours[name] == pytest.approx(theirs[name], abs=2e-3)


def test_batch_size_and_devices_change_nothing(folder, found):
    on_many = make_pipeline(meshes.make_mesh(2, 2, 2))
    assert_alike(likelihood(on_many, folder, **SETTINGS, batch_size=5), found)


PROGRAM = """
import json, sys
from tokenbridge_jax.runtime import meshes, processes
processes.join(True)
import test_likelihood
pipeline = test_likelihood.make_pipeline(meshes.make_mesh(2, 2, 1))
print(json.dumps(test_likelihood.everything(pipeline, sys.argv[1], batch_size=8)), flush=True)
processes.leave(0)
"""


def everything(pipeline: Pipeline, folder: str, batch_size: int) -> list:
    """All evaluations of a workdir; with one image, one of two processes has no share."""
    codec = reconstructing.make_codec(len(jax.local_devices()))
    image = reconstructing.image_set(reconstructing.IMAGES[:1])
    return [
        likelihood(pipeline, folder, **SETTINGS, batch_size=batch_size),
        tokens.token_statistics(folder),
        *reconstructing.score(codec)["rows"],
        *reconstruction(codec, image, reconstructing.VARIANTS[-1:])["rows"],
    ]


def test_processes_and_their_devices_change_nothing(pipeline, folder):
    job = start_job(["-c", PROGRAM, folder], [[], []], devices=2)
    outputs = [process.communicate(timeout=120)[0] for process in job]
    assert [process.returncode for process in job] == [0, 0]
    one, other = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert one == other
    alone = everything(pipeline, folder, batch_size=11)
    assert_alike(one[0], alone[0])
    assert one[1] == alone[1]
    for ours, theirs in zip(one[2:], alone[2:], strict=True):
        reconstructing.assert_alike(ours, theirs)


def test_splits_and_subsets(pipeline, folder, tmp_path):
    some = likelihood(pipeline, folder, num_iter=1, split="train", max_images=1)
    assert (some["split"], some["images"]) == ("train", 1)
    assert some["bits_per_index_standard_error"] is None
    write_tokens(tmp_path, {"train": [1]})
    assert likelihood(pipeline, tmp_path, num_iter=1)["split"] == "train"


def test_mistakes_are_reported(pipeline, folder, tmp_path, one_device):
    for settings, message in [
        (
            dict(order="confidence"),
            r"sampling\.order='confidence' has no exact likelihood; set it to",
        ),
        (dict(order="raster", num_orders=2), "num_orders=2 must be 1, or more for random"),
        (dict(seed=-1), "seed=-1 must be from 0"),
        (dict(max_images=0), "there must be images and batches of at least 1, not 0"),
        (dict(split="test"), "no split 'test'"),
    ]:
        with pytest.raises(UserError, match=message):
            likelihood(pipeline, folder, **settings)
    for fields, message in [
        (dict(levels=8), "the token shards have levels = 8 but this run has 16"),
        (dict(quantizer=Quantizer.gaussian(16, 2.0)), "has other levels than the model's"),
        (dict(class_names=("cat", "dog", "owl", "elk")), "shards have 4 classes, the model 3"),
    ]:
        write_tokens(tmp_path, {"train": [2]}, **fields)
        with pytest.raises(UserError, match=message):
            likelihood(pipeline, tmp_path)
    broken = jax.tree.map(lambda x: x * np.nan, pipeline.params)
    with pytest.raises(UserError, match="the model's probabilities are NaN"):
        likelihood(make_pipeline(one_device, broken), folder, num_iter=1)


# --- Calibration ----------------------------------------------------------------------------------


def test_calibration_is_numpys():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.01, 1, size=(40, 5, 3)).astype(np.float32)
    correct = rng.random(confidence.shape) < confidence**2
    below = rng.uniform(0, 0.5, size=confidence.shape).astype(np.float32)
    width = rng.uniform(0, 0.5, size=confidence.shape).astype(np.float32)
    width[0] = 0
    calibration = Calibration()
    for half in (slice(None, 30), slice(30, None)):
        calibration.update(confidence[half], correct[half], below[half], width[half])
    found = calibration.summary()
    bins = dict(bins=15, range=(0, 1))
    count, _ = np.histogram(confidence, **bins)
    sums, _ = np.histogram(confidence, **bins, weights=confidence.astype(np.float64))
    hits, _ = np.histogram(confidence, **bins, weights=correct.astype(float))
    assert found["bins"]["count"] == count.tolist()
    np.testing.assert_allclose(found["bins"]["confidence"], sums / count, rtol=1e-9)
    np.testing.assert_allclose(found["bins"]["accuracy"], hits / count, rtol=1e-9)
    error = sum(n / 600 * abs(h - s) / n for n, s, h in zip(count, sums, hits, strict=True))
    assert found["expected_calibration_error"] == pytest.approx(error, rel=1e-9)
    assert found["accuracy"] == pytest.approx(correct.mean())
    # Many points in the interval of every index.
    points = below[..., None] + (np.arange(200) + 0.5) / 200 * width[..., None]
    shares, _ = np.histogram(points, bins=20, range=(0, 1))
    np.testing.assert_allclose(found["pit"], shares / points.size, atol=5e-4)


def test_right_probabilities_are_calibrated():
    """Levels drawn from the scored distributions; then from flatter ones."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 6))
    found = []
    for drawn_from in (logits, logits / 2):
        index = (drawn_from + rng.gumbel(size=logits.shape)).argmax(axis=1)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        rows, below = np.arange(len(p)), np.cumsum(p, axis=1) - p
        calibration = Calibration()
        calibration.update(
            p.max(axis=1), p.argmax(axis=1) == index, below[rows, index], p[rows, index]
        )
        found.append(calibration.summary())
    assert found[0]["expected_calibration_error"] < 0.012
    np.testing.assert_allclose(found[0]["pit"], 0.05, atol=0.004)
    assert found[1]["expected_calibration_error"] > 0.05


def test_the_result_is_json_and_plotted(found, tmp_path):
    assert_json_and_plots(found, module.plot, tmp_path, 3)
