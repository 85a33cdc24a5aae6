"""All commands from images to samples, on digits with the smallest sizes; then `Pipeline`."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from test_configs import CONFIGS
from test_evaluate import means, scipys_distance

from tokenbridge_jax import Pipeline
from tokenbridge_jax.commands import runner
from tokenbridge_jax.data.images import prepare
from tokenbridge_jax.data.sources import DigitsSource
from tokenbridge_jax.evaluation.generation import make_labels
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.metric_writer import read_metrics

SMALL = [
    f"--config={CONFIGS / 'digits.py'}:quick",
    "--config.data.image_size=8",
    "--config.data.workers=1",
    "--config.autoencoder.channels=8",
    "--config.autoencoder.multipliers=(1,1)",
    "--config.autoencoder.latent_channels=4",
    "--config.vae_training.steps=3",
    "--config.vae_training.checkpoint_every=3",
    *(f"--config.model.{part}_width=16" for part in ("encoder", "decoder", "head")),
    *(f"--config.model.{part}_layers=1" for part in ("encoder", "decoder", "head")),
    "--config.training.steps=4",
    "--config.training.checkpoint_every=2",
    "--config.training.eval_every=4",
    "--config.training.sample_every=0",
    "--config.evaluation.every=2",
    "--config.evaluation.num_images=7",
    "--config.sampling.num_iter=3",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir after train-vae, tokenize and train; only the first command names the config."""
    workdir = tmp_path_factory.mktemp("line")
    assert runner.run("train-vae", [f"--workdir={workdir}", *SMALL]) == 0
    assert runner.run("tokenize", [f"--workdir={workdir}"]) == 0
    assert runner.run("train", [f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def pipeline(workdir):
    return Pipeline.load(workdir)


def test_samples_are_written(workdir, pipeline, capsys):
    flags = [f"--workdir={workdir}", "--num_images=7", "--classes=3,8", "--seed=5"]
    assert runner.run("sample", flags) == 0
    with np.load(workdir / "samples" / "samples.npz") as file:
        samples = dict(file)
    assert samples["labels"].tolist() == [3, 8, 3, 8, 3, 8, 3]
    assert samples["arr_0"].shape == (7, 8, 8, 1)
    assert samples["arr_0"].dtype == np.uint8
    settings = dict(num_iter=3, guidance=2.0, temperature=0.7)
    again = pipeline.generate(samples["labels"].tolist(), seed=5, **settings)
    np.testing.assert_array_equal(samples["arr_0"], again)
    # Two columns of cells 48 pixels wide, with a gap of 2 between them.
    with Image.open(workdir / "samples" / "grid.png") as picture:
        assert picture.size == (98, 198)
    assert "7 images" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_file_for_each_sample(workdir, pipeline, tmp_path, capsys, kind):
    flags = [f"--workdir={workdir}", "--num_images=7", "--classes=3,8", f"--output={tmp_path}"]
    flags += [f"--format={kind}", "--config.sampling.batch_size=4"]
    assert runner.run("sample", flags) == 0
    assert f"wrote {tmp_path / 'images'} (7 images)" in capsys.readouterr().out
    *names, last, _ = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{number:07d}.{kind}" for number in range(7)]
    labels = np.load(tmp_path / "images" / last)
    assert labels.tolist() == [3, 8, 3, 8, 3, 8, 3]
    settings = dict(num_iter=3, guidance=2.0, temperature=0.7, batch_size=4)
    for name, expected in zip(names, pipeline.generate(labels.tolist(), **settings), strict=True):
        with Image.open(tmp_path / "images" / name) as picture:
            assert picture.format == kind.upper()
            np.testing.assert_array_equal(np.asarray(picture.convert("L")), expected[..., 0])
    assert (tmp_path / "grid.png").exists()


def test_a_stream_draws_one_batch_after_the_other(pipeline):
    settings = dict(num_iter=3, guidance=2.0, seed=5)
    # A hundred thousand images: only the first batches are drawn.
    parts = pipeline.stream([1, 2] * 50_000, batch_size=8, **settings)
    first = np.concatenate([next(parts), next(parts)])
    parts.close()
    indices = pipeline.generate_indices([1, 2] * 8, batch_size=8, **settings)
    np.testing.assert_array_equal(
        first, np.concatenate([*map(pipeline.decode, (indices[:8], indices[8:]))])
    )
    sizes = [len(part) for part in pipeline.stream([3] * 19, batch_size=8, **settings)]
    assert sizes == [8, 8, 3]
    parts = pipeline.stream([1, 2] * 8, batch_size=8, numbers=[3, 12, 9], **settings)
    np.testing.assert_array_equal(np.concatenate(list(parts)), first[[3, 12, 9]])
    with pytest.raises(UserError, match=r"sampling.batch_size=0 must be at least 1"):
        pipeline.stream([3], batch_size=0)


def test_metrics_have_the_likelihood(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    assert rows[-1]["step"] == 4
    # An untrained model is about uniform over 32 levels.
    assert rows[-1]["val_nll_bits_per_index"] == pytest.approx(5, abs=1)


def test_samples_are_scored_in_training(workdir, pipeline):
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_thumbnail_distance" in row] == [2, 4]
    labels = make_labels("balanced", 7, 10, seed=0)
    samples = pipeline.generate(labels.tolist(), num_iter=3, guidance=2.0, temperature=0.7)
    source = DigitsSource("train")
    real = np.stack([prepare(source.load(i)[0], 8, 1) for i in range(len(source))])
    expected = scipys_distance(*(means(x.repeat(3, axis=-1)) for x in (samples, real)))
    assert rows[-1]["eval_thumbnail_distance"] == pytest.approx(expected, rel=1e-4)
    assert {"eval_precision", "eval_recall"} <= set(rows[-1])


def test_a_mesh_changes_nothing(workdir, pipeline):
    other = Pipeline.load(workdir, mesh=meshes.make_mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(
        pipeline.generate_indices([1, 2, 3], num_iter=3, guidance=2.0),
        other.generate_indices([1, 2, 3], num_iter=3, guidance=2.0),
    )


def test_encode_and_decode_equal_those_of_the_codec(pipeline):
    images = DigitsSource("validation").images[:5]
    indices = pipeline.encode(images)
    assert indices.shape == (5, 16, 4)
    assert indices.dtype == np.uint8
    latents = np.asarray(pipeline.codec.encode(images).latents).reshape(5, 16, 4)
    levels = pipeline.config.quantizer.dequantized_levels
    nearest = np.argmin(np.abs(np.clip(latents, -4, 4)[..., None] - levels), axis=-1)
    np.testing.assert_array_equal(indices, nearest)
    decoded = pipeline.decode(indices)
    assert decoded.shape == images.shape
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_images=0"], "--num_images=0 must be at least 1"),
        (["--classes=12"], "class 12 does not exist; classes are 0..9"),
        (["--config.sampling.num_iter=0"], "sampling.num_iter=0 must be at least 1"),
        (["--config.mesh.data=3"], "does not fit 8 devices"),
        (["--step=99"], "there is no checkpoint of step 99; there are 2, 4"),
        (["--config.sampling.batch_size=0"], "sampling.batch_size=0 must be at least 1"),
    ],
)
def test_mistakes_are_reported_in_one_line(workdir, capsys, flags, message):
    assert runner.run("sample", [f"--workdir={workdir}", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_workdir_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no trained model; run `tokenbridge train` first"):
        Pipeline.load(tmp_path)


def test_another_autoencoder_is_refused(workdir):
    description = ModelDescription.load(workdir)
    try:
        dataclasses.replace(description, autoencoder_hash="0" * 64).save(workdir)
        with pytest.raises(UserError, match="is not the autoencoder this model was trained with"):
            Pipeline.load(workdir)
    finally:
        description.save(workdir)
