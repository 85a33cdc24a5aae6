"""Shards of latents: the autoencoder's posterior in float16, its draws by the loader, refusals."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from token_shards import (
    AUTOENCODER,
    documented_records,
    make_config,
    make_info,
    posterior_of,
    random_records,
    read_split,
    write_tokens,
)

from tokenbridge_jax.autoencoder import init_params, save_autoencoder
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.loader import make_loader, validation_batches
from tokenbridge_jax.data.tokenizing import tokenize
from tokenbridge_jax.evaluation.tokens import token_statistics
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("programs")
NORMAL, SMALLEST = 2.0**-11, 2.0**-25  # Half a unit in float16's last place.


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["latents", "both"])
def test_records_hold_the_posterior_of_the_autoencoder(workdir, finished, images, store, capsys):
    """The module encodes each picture alone; its result is rounded once to float16."""
    info = tokenize(make_config(images, tokenize__store=store), workdir).info
    records = read_split(workdir)
    names = [f"class{c}/{i:02}.png" for c in range(3) for i in range(c, 27, 3)]
    for record in records[::9]:
        pixels = np.asarray(Image.open(images / names[record["image"]]).resize((20, 16), 3))[
            :, 2:18
        ]
        for view, shown in enumerate((pixels, pixels[:, ::-1])):
            for name, exact in zip(
                ("mean", "deviation"), posterior_of(workdir, shown), strict=True
            ):
                assert record[name].dtype == np.float16
                exact, found = 1.5 * exact.astype(np.float64), record[name][view]
                # The device's float32 rounding is much smaller.
                bound = NORMAL * np.abs(exact) + SMALLEST + 2e-6
                assert (np.abs(found - exact) <= bound).all()
    # The other content does not depend on what is stored.
    theirs = read_split(finished)
    for name in ("image", "label", *(["indices"] if store == "both" else [])):
        assert np.array_equal(records[name], theirs[name])
    described = storage.read_json(workdir / "tokens" / shards.INFO_FILE)
    assert shards.DatasetInfo.from_json(described) == info
    assert described["store"] == store
    assert described["record_bytes"] == records.dtype.itemsize
    assert described["latent_views"] == [{"flipped": False}, {"flipped": True}]
    assert np.array_equal(documented_records(workdir / "tokens"), records[:10])
    # 64 positions, 4 channels, 2 views: of 1 byte, or of 2 bytes for the mean and the deviation.
    assert (
        f"stores {store}; bytes an image, before compression: 524 with tokenize.store=indices, "
        "2,060 with tokenize.store=latents, 2,572 with tokenize.store=both"
    ) in capsys.readouterr().err


def test_posterior_samples_only_matter_for_indices(workdir, images):
    config = make_config(images, tokenize__store="latents", tokenize__posterior_samples=3)
    info = tokenize(config, workdir).info
    assert (info.posterior_samples, info.latent_views) == (0, 2)
    config.tokenize.posterior_samples = 1
    assert tokenize(config, workdir).images == 0


def save_with_bias(workdir, channel: int, bias: float) -> None:
    """The autoencoder with one number of its moments (4 means, 4 log-variances) near `bias`."""
    params = jax.tree.map(np.array, init_params(AUTOENCODER, jax.random.key(0)))
    params["quant_conv"]["bias"][channel] = bias
    save_autoencoder(workdir / "autoencoder", AUTOENCODER, params)


def test_the_smallest_and_largest_deviations_are_kept(workdir, images):
    """Log-variances are limited to -30 and 20."""
    config = make_config(images, tokenize__store="latents", data__flip=False)
    for bias, logvar in ((-200, -30), (200, 20)):
        save_with_bias(workdir, 4, bias)
        tokenize(config, workdir)
        deviation = read_split(workdir)["deviation"][..., 0]
        expected = 1.5 * np.exp(logvar / 2)
        assert (deviation > 0).all()
        assert np.abs(deviation - expected).max() <= NORMAL * expected + SMALLEST
        for path in (workdir / "tokens").rglob("*.*"):
            path.unlink()


@pytest.mark.parametrize(("channel", "bias"), [(0, 1e5), (4, np.nan)])
def test_latents_that_do_not_fit_name_the_picture(workdir, images, channel, bias):
    save_with_bias(workdir, channel, bias)
    message = r"latents of class0/00\.png or their deviations do not fit into float16"
    with pytest.raises(UserError, match=message):
        tokenize(make_config(images, tokenize__store="latents"), workdir)
    assert not list((workdir / "tokens").glob("*.array_record"))


# --- Reading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_tokens(folder, {"train": [9, 11], "validation": [7]}, flips=True, store="latents")
    return folder


RECORDS = random_records(make_info(flips=True, store="latents"), range(20))


def standardised(latents, image):
    """For both views: the latents less the image's mean, over its deviation."""
    record = RECORDS[image]
    return (latents - record["mean"].astype(np.float32)) / record["deviation"].astype(np.float32)


def test_draws_have_the_posteriors_mean_and_deviation(folder):
    """The view is the one with the nearer mean: the views' means are several deviations apart."""
    seed, epochs = 5, 40
    drawn = {image: [] for image in range(20)}
    orders = [np.random.default_rng((seed, 0, epoch)).permutation(20) for epoch in range(epochs)]
    stream = make_loader(folder, 10, seed, latents=True)
    for step, batch in enumerate(itertools.islice(stream, 2 * epochs)):
        assert batch["indices"].dtype == np.float32
        assert batch["indices"].shape == (10, 16, 3)
        for row, latents in enumerate(batch["indices"]):
            image = int(orders[step // 2][10 * (step % 2) + row])
            assert batch["labels"][row] == image % 3
            z = standardised(latents, image)
            view = int(np.argmin(np.square(z).mean(axis=(1, 2))))
            drawn[image].append((view, z[view]))
    views = np.array([[view for view, _ in of_image] for of_image in drawn.values()])
    assert stats.binomtest(int(views.sum()), views.size).pvalue > 1e-3
    noise = np.array([[z for _, z in of_image] for of_image in drawn.values()])
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.size) ** 0.5
    # Neither images nor epochs share noise: 800 draws of 48 numbers, with correlations of 0.14.
    correlations = np.corrcoef(noise.reshape(len(noise) * epochs, -1))
    assert np.abs(correlations[np.triu_indices(800, 1)]).max() < 0.9


@pytest.mark.parametrize("size", [8, 20])  # 16 rows share a generator of noise.
def test_draws_do_not_depend_on_processes_and_resume_exactly(folder, size):
    whole = list(itertools.islice(make_loader(folder, size, 2, latents=True), 12))
    parts = [
        list(itertools.islice(make_loader(folder, size, 2, latents=True, rows=rows), 12))
        for rows in np.arange(size).reshape(4, -1)
    ]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            joined = np.concatenate([part[step][name] for part in parts])
            assert np.array_equal(joined, value)
    for start in (1, 2, 7):  # With 8, step 2 ends one epoch of 20 and begins another.
        resumed = make_loader(folder, size, 2, latents=True, start_step=start)
        for expected, batch in zip(whole[start:], resumed, strict=False):
            assert np.array_equal(batch["indices"], expected["indices"])
    other = next(make_loader(folder, size, 3, latents=True))
    assert not np.array_equal(other["indices"], whole[0]["indices"])


def test_validation_draws_the_same_in_every_pass_and_batch(folder):
    def read(size):
        batches = list(validation_batches(folder, size, latents=True))
        weights = np.concatenate([batch["weights"] for batch in batches])
        return np.concatenate([batch["indices"] for batch in batches])[weights == 1]

    found = read(7)
    assert np.array_equal(read(7), found)
    assert np.array_equal(read(4), found)
    assert np.array_equal(read(32), found)
    z = np.array([standardised(latents, image)[0] for image, latents in enumerate(found)])
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3


def test_shards_with_both_serve_both(tmp_path):
    info = write_tokens(tmp_path, {"train": [6]}, store="both", samples=2)
    records = random_records(info, range(6))
    (indices,) = validation_batches(tmp_path, 6, split="train")
    assert np.array_equal(indices["indices"], records["indices"][:, 0])
    (latents,) = validation_batches(tmp_path, 6, split="train", latents=True)
    assert np.abs(latents["indices"] - records["mean"][:, 0]).max() < 5 * 0.3
    assert token_statistics(tmp_path)["images"] == 6


def test_what_shards_do_not_hold_is_named(tmp_path, folder):
    write_tokens(tmp_path, {"train": [6]})
    for make in (make_loader, validation_batches):
        arguments = (2, 0) if make is make_loader else (2,)
        with pytest.raises(UserError, match=r"needs latents, but the token shards hold indices on"):
            make(tmp_path, *arguments, latents=True)
        with pytest.raises(UserError, match=r"needs indices, but the token shards hold latents on"):
            make(folder, *arguments)
    with pytest.raises(UserError, match=r"needs indices.*--config\.tokenize\.store=indices"):
        token_statistics(folder)


def test_evaluate_tokens_says_why_in_one_line(tmp_path, folder, refused):
    (tmp_path / "tokens").symlink_to(folder)
    flags = [f"--workdir={tmp_path}", "--config=digits"]
    refused("evaluate", "needs indices, but the token shards hold latents only", ["tokens", *flags])
