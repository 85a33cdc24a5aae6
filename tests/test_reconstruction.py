"""Reconstruction of quantized and perturbed latents, against numpy on all images at once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import assert_json_and_plots
from scipy import stats
from tiny_model import AUTOENCODER

from tokenbridge_jax.autoencoder import init_params
from tokenbridge_jax.codec import Codec, in_batches
from tokenbridge_jax.evaluation import lpips, pixels
from tokenbridge_jax.evaluation import reconstruction as module
from tokenbridge_jax.evaluation.features import Extractor, Features
from tokenbridge_jax.evaluation.image_sets import ImageSet, rgb
from tokenbridge_jax.evaluation.metrics import frechet_distance, inception_score
from tokenbridge_jax.evaluation.moments import gaussian
from tokenbridge_jax.evaluation.reconstruction import reconstruction
from tokenbridge_jax.evaluation.variants import Variant, perturb, sweep
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError

# The range is three deviations of an untrained autoencoder's latents.
OWN = Quantizer.gaussian(16, 0.4)
COUNT = 23
GREY = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), np.uint8)
IMAGES = GREY.repeat(3, axis=-1)
VARIANTS = sweep(OWN, levels=(4, 8), ranges=(0.2,), perturbations=[(0.5, 2)])


class Projection(Extractor):
    """Random sums of pixels as features, and of their squares as logits."""

    distance = "fid"

    def __init__(self, batch_size: int = 5):
        self.facts = {}
        self.batch_size = batch_size
        self._weights = np.random.default_rng(1).normal(size=(192, 9)) / 192

    def __call__(self, images: np.ndarray) -> Features:
        assert len(images) <= self.batch_size
        x = images.reshape(len(images), -1) / 255.0
        features = (x @ self._weights[:, :4]).astype(np.float32)
        return Features(features, None, (100 * x**2 @ self._weights[:, 4:]).astype(np.float32))


def make_codec(devices: int = 1) -> Codec:
    mesh = meshes.make_mesh(devices=jax.local_devices()[:devices])
    return Codec(AUTOENCODER, init_params(AUTOENCODER, jax.random.key(0)), OWN, mesh)


def image_set(images: np.ndarray = IMAGES) -> ImageSet:
    return ImageSet(Path("noise"), lambda some: some, images, images.shape[1:])


def score(codec: Codec, batch_size: int = 5, **settings):
    return reconstruction(
        codec, image_set(), VARIANTS, extractor=Projection(batch_size), **settings
    )


@pytest.fixture(scope="module")
def codec():
    return make_codec()


@pytest.fixture(scope="module")
def found(codec):
    return score(codec)


@pytest.fixture(scope="module", params=["mean", "sample"])
def decoded(request, codec):
    """The result of `reconstruction`, the latents, and the indices of every variant."""
    found = score(codec, posterior=request.param, seed=7)
    numbers = np.arange(COUNT)
    noise = None if request.param == "mean" else numbers
    latents = np.asarray(codec.encode(GREY, noise, seed=7).latents)
    made = []
    for variant in VARIANTS:
        indices = None
        if variant.quantizer:
            indices = np.asarray(variant.quantizer.quantize(latents)).reshape(COUNT, 16, 4)
            if variant.share:
                indices = perturb(indices, numbers, 16, variant, seed=7)
        made.append((variant, indices))
    return found, latents, made


def levels_of(quantizer: Quantizer, indices: np.ndarray) -> np.ndarray:
    return quantizer.dequantized_levels[indices].reshape(COUNT, 4, 4, 4)


def test_rows_are_those_of_all_images_at_once(codec, decoded):
    found, latents, made = decoded
    extract = Projection(COUNT)
    variance = latents.astype(np.float64).var(axis=(0, 1, 2)).mean()
    assert found["latent_variance"] == pytest.approx(variance, rel=1e-6)
    for row, (variant, indices) in zip(found["rows"], made, strict=True):
        changed = latents if indices is None else levels_of(variant.quantizer, indices)
        # In the same batches, because rounding in others may change a pixel.
        images = in_batches(lambda some: np.asarray(codec.decode_latents(some)), changed, 5)
        expected = {
            "psnr": pixels.psnr(GREY, images).mean(),
            "ssim": pixels.ssim(GREY, images).mean(),
            "latent_mse": ((changed - latents) ** 2).mean(),
            "rfid": frechet_distance(
                gaussian(extract(rgb(images)).pool), gaussian(extract(IMAGES).pool)
            ),
        }
        by_split = extract(rgb(images)).logits[np.argsort(np.arange(COUNT) % 10, kind="stable")]
        # Three splits have three images and the others two, as in numpy's splits.
        score, deviation = inception_score(by_split)
        expected |= {"inception_score": score, "inception_score_std": deviation}
        if indices is not None:
            expected["latent_snr_db"] = 10 * np.log10(variance / expected["latent_mse"])
            limit = variant.quantizer.maximum
            expected["clipped_share"] = (np.abs(latents) > limit).mean()
            used = [len(np.unique(indices[..., c])) for c in range(4)]
            expected["levels_used"] = np.mean(used) / variant.quantizer.levels
        if variant.share:
            whole = levels_of(OWN, np.asarray(OWN.quantize(latents)))
            expected["perturbation_mse"] = ((changed - whole) ** 2).mean()
            ratio = variance / expected["perturbation_mse"]
            expected["perturbation_snr_db"] = 10 * np.log10(ratio)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_rows_of_a_sweep(found):
    rows = [(r["levels"], r["range"], r["share"], r["delta"]) for r in found["rows"]]
    own, paper = (16, 0.4), Quantizer.gaussian(64, 5.0)
    quantized = [(4, 0.4, 0, 0), (8, 0.4, 0, 0), (*own, 0, 0), (16, 0.2, 0, 0), (*own, 0.5, 2)]
    assert rows == [(None, None, 0, 0), *quantized]
    quantizers = [variant.quantizer for variant in sweep(paper)]
    assert [q and q.levels for q in quantizers] == [None, 8, 16, 32, 64, 64, 64, 64]
    assert [q and q.maximum for q in quantizers] == [None, 5, 5, 5, 5, 2, 3, 4]
    assert quantizers[4] is paper
    errors = [row["latent_mse"] for row in found["rows"]]
    assert 0 == errors[0] < errors[3] < errors[2] < errors[1]
    assert errors[5] > errors[3] < errors[4]
    assert len({tuple(row) for row in found["rows"]}) == 1
    for row in found["rows"]:
        unknown = {name for name, value in row.items() if value is None}
        expected = {"rfid_reference"}
        if row["levels"] is None:
            expected |= {"levels", "range", "levels_used", "clipped_share", "latent_snr_db"}
        if not row["share"]:
            expected |= {"perturbation_mse", "perturbation_snr_db"}
        assert unknown == expected


def assert_alike(row: dict, expected: dict) -> None:
    """Equal except for float32 rounding, which may change a pixel or an index."""
    ours, theirs = ({k: v for k, v in x.items() if v is not None} for x in (row, expected))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_batches_blocks_and_devices_change_nothing(found, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 9)
    other = score(make_codec(devices=8), batch_size=8)
    for ours, theirs in zip(other["rows"], found["rows"], strict=True):
        assert_alike(ours, theirs)


def test_reference_and_perceptual_distance(codec, found, monkeypatch):
    network = ((lpips.Conv(0, 4),), (2, lpips.Conv(2, 6)))
    monkeypatch.setitem(lpips.NETWORKS, "small", network)
    rng = np.random.default_rng(0)
    shapes = {"conv0": (3, 3, 3, 4), "conv2": (3, 3, 4, 6)}
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.zeros(shape[-1])}
        for name, shape in shapes.items()
    }
    params |= {f"lin{i}": {"weight": np.ones(n, np.float32)} for i, n in enumerate((4, 6))}
    reference = gaussian(Projection(COUNT)(IMAGES[:9]).pool)
    other = score(codec, reference=reference, perceptual={"small": params})
    images = np.asarray(codec.decode_latents(codec.encode(GREY).latents))
    pair = jnp.asarray(IMAGES), jnp.asarray(rgb(images))
    expected = np.asarray(lpips.distance(params, *pair, network="small")).mean()
    first = other["rows"][0]
    assert first["lpips_small"] == pytest.approx(expected, rel=1e-5)
    distance = frechet_distance(gaussian(Projection(COUNT)(rgb(images)).pool), reference)
    assert first["rfid_reference"] == pytest.approx(distance, rel=1e-5)
    assert_alike(first | {"lpips_small": None, "rfid_reference": None}, found["rows"][0])


def test_without_an_extractor(codec, found):
    row = reconstruction(codec, image_set(), VARIANTS[:2])["rows"][1]
    unknown = dict.fromkeys(("rfid", "inception_score", "inception_score_std"))
    assert row | unknown == row
    assert_alike(row, found["rows"][1] | unknown)


# --- Perturbations --------------------------------------------------------------------------------


def test_perturbed_indices_are_moved_by_chance():
    indices = np.full((50, 64, 8), 20)
    numbers = np.arange(50)
    moved = perturb(indices, numbers, 40, Variant(OWN, 0.3, 3), seed=0)
    steps, counts = np.unique(moved - 20, return_counts=True)
    assert steps.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    chances = np.array([0.05, 0.05, 0.05, 0.7, 0.05, 0.05, 0.05])
    assert stats.chisquare(counts, chances * indices.size).pvalue > 0.01
    everything = perturb(indices, numbers, 40, Variant(OWN, 1.0, 1), seed=0)
    assert set(np.unique(everything)) == {19, 21}
    # A larger share moves more indices, and the same ones alike.
    more = perturb(indices, numbers, 40, Variant(OWN, 0.6, 3), seed=0)
    np.testing.assert_array_equal(more[moved != 20], moved[moved != 20])
    assert (more != 20).mean() == pytest.approx(0.6, abs=0.01)


def test_perturbed_indices_stay_levels():
    indices = np.repeat([0, 39], 32).reshape(1, 64, 1)
    moved = perturb(indices, np.array([5]), 40, Variant(OWN, 1.0, 3), seed=0)
    assert set(np.unique(moved)) <= {0, 1, 2, 3, 36, 37, 38, 39}
    assert 0 < (moved == indices).mean() < 1


def test_perturbations_depend_on_the_number_of_the_image():
    indices = np.random.default_rng(0).integers(16, size=(6, 9, 3))
    variant = Variant(OWN, 0.5, 2)
    moved = perturb(indices, np.arange(6), 16, variant, seed=3)
    some = np.array([4, 1])
    np.testing.assert_array_equal(perturb(indices[some], some, 16, variant, 3), moved[some])
    assert (perturb(indices, np.arange(6), 16, variant, seed=4) != moved).any()
    assert (perturb(indices, np.arange(6) + 1, 16, variant, seed=3) != moved).any()


# --- Mistakes, and results ------------------------------------------------------------------------


def test_mistakes_are_reported(codec):
    for share, delta in ((0.5, 0), (0.0, 2), (1.5, 1), (0.5, -1)):
        with pytest.raises(UserError, match=f"perturbed with share {share} and delta {delta}"):
            Variant(OWN, share, delta)
    with pytest.raises(UserError, match="posterior='mode' is neither"):
        reconstruction(codec, image_set(), VARIANTS, posterior="mode")
    for images, message in [
        (IMAGES[:, :4], "SSIM needs images of at least 7 pixels"),
        (IMAGES * np.array([1, 1, 0], np.uint8), "noise: there are colours, but the autoencoder"),
    ]:
        with pytest.raises(UserError, match=message):
            reconstruction(codec, image_set(images), VARIANTS)
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        reconstruction(codec, image_set(IMAGES[:1]), VARIANTS[:1], extractor=Projection())
    broken = make_codec()
    broken.params = jax.tree.map(lambda x: x * np.nan, broken.params)
    with pytest.raises(UserError, match="latents of image 0 are NaN"):
        reconstruction(broken, image_set(), VARIANTS[:1])


def test_the_result_is_json_and_plotted(found, tmp_path):
    assert_json_and_plots(found, module.plot, tmp_path, 1)
