"""Tokenizing as a whole: content, broken pictures, validation splits, refused settings."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from token_shards import (
    AUTOENCODER,
    contents,
    make_config,
    make_info,
    nearest,
    posterior_of,
    read_split,
)

from tokenbridge_jax.autoencoder import init_params, save_autoencoder
from tokenbridge_jax.channels import ChannelSpectrum
from tokenbridge_jax.commands import runner
from tokenbridge_jax.config import experiment
from tokenbridge_jax.data import shards, sources, tokenizing
from tokenbridge_jax.data.tokenizing import tokenize
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("programs")


def cropped(path: Path) -> np.ndarray:
    """One of the pictures, prepared by Pillow alone."""
    return np.asarray(Image.open(path).resize((20, 16), Image.BICUBIC))[:, 2:18]


def test_records_are_the_quantized_pictures(workdir, images):
    config = make_config(images, tokenize__posterior_samples=0)
    result = tokenize(config, workdir)
    assert result.images == 27
    records = read_split(workdir)
    assert records["image"].tolist() == list(range(27))
    assert records["label"].tolist() == sorted(i % 3 for i in range(27))
    names = [f"class{c}/{i:02}.png" for c in range(3) for i in range(c, 27, 3)]
    for record in records[::6]:
        pixels = cropped(images / names[record["image"]])
        for view, mirrored in enumerate((pixels, pixels[:, ::-1])):
            latents = posterior_of(workdir, mirrored)[0] * 1.5
            expected = nearest(latents, result.info.quantizer.level_values, 3.0)
            # A latent between two levels may be rounded to either.
            assert np.mean(record["indices"][view] != expected) < 0.02
    assert result.info.class_names == ("class0", "class1", "class2")
    assert result.info.statistics["train"]["latents"] == 27 * 2 * 64 * 4


def test_posterior_samples_have_the_posteriors_spread(workdir, images):
    config = make_config(images, tokenize__posterior_samples=12, quantizer__levels=300)
    info = tokenize(config, workdir).info
    record = read_split(workdir)[0]
    assert record["indices"].shape == (24, 64, 4)
    latents = np.asarray(info.quantizer.dequantize(record["indices"].astype(np.int32)))
    plain, mirrored = latents[0::2], latents[1::2]
    pixels = cropped(images / "class0" / "00.png")
    for samples, shown in ((plain, pixels), (mirrored, pixels[:, ::-1])):
        mean, deviation = posterior_of(workdir, shown)
        z = (samples / 1.5 - mean) / deviation
        assert abs(z.mean()) < 0.1  # 3072 draws: 0.018 is one standard error.
        assert abs(z.std() - 1) < 0.1
    correlations = np.corrcoef((plain - plain.mean(axis=0)).reshape(12, -1))
    assert np.abs(correlations[0, 1:]).max() < 0.5


def test_noise_depends_on_the_picture_alone(workdir, finished, images):
    # Batches, shards and worker processes do not change the draws.
    config = make_config(images, tokenize__batch_size=16, tokenize__records_per_shard=100)
    config.data.workers = 2
    tokenize(config, workdir)
    ours, theirs = read_split(workdir), read_split(finished)
    assert np.array_equal(ours["image"], theirs["image"])
    assert np.mean(ours["indices"] != theirs["indices"]) < 0.002
    config.seed = 4
    shutil.rmtree(workdir / "tokens")
    tokenize(config, workdir)
    assert np.mean(read_split(workdir)["indices"] != ours["indices"]) > 0.1


@pytest.fixture
def partly_broken(images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    whole = (root / "class1" / "01.png").read_bytes()
    (root / "class1" / "01.png").write_bytes(whole[: len(whole) // 2])
    (root / "class2" / "26.png").write_bytes(b"")
    return root


def test_broken_pictures_are_named_counted_and_left_out(partly_broken, workdir, finished, capsys):
    info = tokenize(make_config(partly_broken), workdir).info
    assert [entry["image"] for entry in info.skipped] == [9, 26]
    assert info.skipped[0]["reason"].startswith("class1/01.png: image file is truncated")
    assert "broken image left out: class2/26.png: cannot identify" in capsys.readouterr().err
    # The others do not change.
    whole = read_split(finished)
    assert np.array_equal(read_split(workdir), np.delete(whole, [9, 26]))
    assert info.splits["train"]["images"] == 25
    assert info.statistics["train"]["latents"] == 25 * 2 * 64 * 4


def test_pictures_without_a_class_are_refused(workdir, images, monkeypatch):
    """TFDS writes the label -1 for pictures without a class."""
    label, load = sources.FolderSource.label, sources.FolderSource.load
    unlabelled = {3, 26}

    def some_label(source, i):
        return -1 if i in unlabelled else label(source, i)

    monkeypatch.setattr(sources.FolderSource, "label", some_label)
    message = r"train split: 2 of 27 pictures have no class, such as class0/09.png with label -1 of"
    with pytest.raises(UserError, match=message):
        tokenize(make_config(images), workdir)
    assert not (workdir / "tokens").exists()
    # A wrong label that is found only when the picture is encoded.
    monkeypatch.setattr(sources.FolderSource, "label", label)
    monkeypatch.setattr(
        sources.FolderSource, "load", lambda self, i: (load(self, i)[0], 3 if i == 26 else 0)
    )
    message = "train split: 1 of 7 pictures have no class, such as class2/26.png with label 3 of 3"
    with pytest.raises(UserError, match=message):
        tokenize(make_config(images), workdir)
    assert not (workdir / "tokens" / "dataset.json").exists()


def test_strict_stops_at_a_broken_picture(partly_broken, workdir):
    with pytest.raises(UserError, match=r"broken image class1/01\.png: .*--strict"):
        tokenize(make_config(partly_broken), workdir, strict=True)
    assert not (workdir / "tokens" / shards.INFO_FILE).exists()


def test_nothing_but_broken_pictures(tmp_path, workdir):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the images could be used.*a/x\.png"):
        tokenize(make_config(tmp_path / "images"), workdir)


def test_validation_is_held_out_by_name(workdir, images):
    info = tokenize(make_config(images, tokenize__validation_fraction=0.3), workdir).info
    train, validation = read_split(workdir), read_split(workdir, "validation")
    assert sorted([*train["image"], *validation["image"]]) == list(range(27))
    assert 0 < len(validation) == info.splits["validation"]["images"] < 15
    assert info.sources["validation"]["chosen"] == len(validation)


def test_small_splits_have_several_shards(images):
    source = sources.make_source(make_config(images).data)
    info = make_info(records_per_shard=1000)
    for count, size in [(1, 64), (64, 64), (250, 64), (513, 128), (7000, 896), (100_000, 1000)]:
        subset = sources.Subset(source, np.arange(5, 5 + count))
        planned = tokenizing.plan_shards(Path("x"), info, {"train": subset})
        assert np.array_equal(np.concatenate([plan.images for plan in planned]), subset.images)
        assert len(planned) == -(-count // size)
        assert all(len(plan.images) == size for plan in planned[:-1])


def test_own_validation_split(workdir, finished, images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root / "train")
    shutil.copytree(images, root / "val")
    config = make_config(root, data__split="train", data__validation_split="val")
    (root / "val" / "class3").mkdir()
    with pytest.raises(UserError, match="validation split 'val' has 4 classes"):
        tokenize(config, workdir)
    (root / "val" / "class3").rmdir()
    (root / "val" / "class2" / "26.png").unlink()
    info = tokenize(config, workdir).info
    counts = {split: entry["images"] for split, entry in info.splits.items()}
    assert counts == {"train": 27, "validation": 26}
    # In the other split, pictures have other noise; in training they have the same as without it.
    train = read_split(workdir)["indices"]
    assert np.mean(train != read_split(finished)["indices"]) < 0.002
    validation = read_split(workdir, "validation")["indices"]
    assert np.mean(validation != train[:26], axis=(2, 3)).min() > 0.1

    # Shards begun by an earlier version are finished as that version would do it.
    described = workdir / "tokens" / "dataset.json"
    text = described.read_text().replace('"split_noise": true', '"ignored": 0')
    described.write_text(text.replace('"precision": "float32"', '"dtype": "float32"'))
    for shard in described.parent.glob("validation-*"):
        shard.unlink()
    tokenize(config, workdir)
    assert np.mean(read_split(workdir, "validation")["indices"] != train[:26]) < 0.002
    assert "split_noise" not in described.read_text()
    info = shards.read_info(described.parent)
    assert info.precision == "unstated"
    # Training on them can be resumed, because this hash of their description has not changed.
    earlier = json.loads(described.read_text()) | {"sources": None}
    assert {"dtype": "float32"}.items() <= earlier.items()
    assert "precision" not in earlier
    assert info.sha256 == hashlib.sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()


def test_channel_order_is_measured_once(workdir, images, monkeypatch):
    config = make_config(images, quantizer__channel_order="frequency", data__flip=False)
    info = tokenize(config, workdir).info
    pictures = map(cropped, sorted(images.rglob("*.png")))
    means = [posterior_of(workdir, pixels)[0].reshape(8, 8, 4) for pixels in pictures]
    spectrum = ChannelSpectrum(info.channels)
    spectrum.update(np.stack(means))
    assert info.channel_order == spectrum.order()
    assert info.channel_order_rule == "frequency, over 27 images"
    monkeypatch.setattr(tokenizing, "_measure_spectrum", None)  # Calling it would raise.
    (workdir / "tokens" / "train-00000-of-00003.array_record").unlink()
    assert tokenize(config, workdir).info == info


def test_other_settings_are_refused_by_name(finished, images, tmp_path):
    before = contents(finished)
    for changes, field in [
        ({"quantizer__levels": 32}, r"quantizer\.level_values"),
        ({"quantizer__range": 4.0}, r"quantizer\.minimum = -3\.0 but this run has -4\.0"),
        ({"quantizer__channel_order": "frequency"}, "channel_order_rule"),
        ({"tokenize__posterior_samples": 2}, "posterior_samples = 1 but this run has 2"),
        ({"tokenize__precision": "bfloat16"}, "precision"),
        ({"tokenize__store": "both"}, 'store = "indices" but this run has "both"'),
        ({"tokenize__validation_fraction": 0.3}, r"sources\.train\.chosen"),
        ({"data__flip": False}, "flips = true but this run has false"),
        ({"seed": 4}, "seed = 3 but this run has 4"),
    ]:
        with pytest.raises(UserError, match=f"{finished}/tokens: .*{field}"):
            tokenize(make_config(images, **changes), finished)
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "class0" / "00.png").rename(tmp_path / "images" / "class0" / "xx.png")
    with pytest.raises(UserError, match=r"sources\.train\.names_sha256"):
        tokenize(make_config(tmp_path / "images"), finished)
    assert contents(finished) == before


def test_another_autoencoder_and_lost_descriptions_are_refused(finished, workdir, images):
    shutil.copytree(finished / "tokens", workdir / "tokens")
    params = jax.device_get(init_params(AUTOENCODER, jax.random.key(1)))
    save_autoencoder(workdir / "autoencoder", AUTOENCODER, params)
    hashes = "autoencoder_hash = [0-9a-f]{12} but this run has [0-9a-f]{12}; "
    with pytest.raises(UserError, match=f"{hashes}.*or put the autoencoder back$"):
        tokenize(make_config(images), workdir)
    (workdir / "tokens" / shards.INFO_FILE).unlink()
    with pytest.raises(UserError, match=r"holds shards without a dataset\.json"):
        tokenize(make_config(images), workdir)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data__image_size": 15}, "not divisible"),
        ({"data__image_channels": 1}, "image channels"),
        ({"data__path": "/nowhere"}, "does not exist"),
        ({"tokenize__validation_fraction": 1.5}, "validation_fraction is 1.5"),
        ({"tokenize__validation_fraction": 1 - 1e-9}, "leaves none of 27 images"),
        ({"tokenize__batch_size": 0}, "batch_size is 0"),
        ({"tokenize__records_per_shard": 0}, "records_per_shard is 0"),
        ({"tokenize__store": "means"}, "store is 'means', must be one of indices, latents, both"),
        ({"tokenize__precision": "half"}, "must be one of float32, tensorfloat32, bfloat16"),
        ({"data__workers": -1}, "data.workers is -1"),
        ({"quantizer__calibration_images": 0}, "calibration_images is 0"),
        ({"quantizer__levels": 1}, "levels is 1"),
        ({"quantizer__channel_order": "kl16"}, "channel order"),
        ({"quantizer__channel_order": (0, 1, 2, 2)}, "channel order"),
    ],
)
def test_impossible_settings_leave_nothing(workdir, images, changes, complaint):
    begun = []
    with pytest.raises(UserError, match=complaint):
        tokenize(make_config(images, **changes), workdir, begin=lambda: begun.append(1))
    assert not (workdir / "tokens").exists()
    assert not begun


def test_unusable_workdirs(tmp_path, images):
    with pytest.raises(UserError, match=r"there is no autoencoder in .*train-vae"):
        tokenize(make_config(images), tmp_path)
    with pytest.raises(UserError, match="mount the bucket"):
        tokenize(make_config(images), "gs://bucket/work")


def test_nan_names_the_picture(workdir, images):
    params = jax.tree.map(np.array, init_params(AUTOENCODER, jax.random.key(0)))
    params["quant_conv"]["bias"][0] = np.nan
    save_autoencoder(workdir / "autoencoder", AUTOENCODER, params)
    with pytest.raises(UserError, match=r"latents of class0/00\.png hold NaN"):
        tokenize(make_config(images), workdir)
    assert not list((workdir / "tokens").glob("*.array_record"))


def test_command(workdir, images, tmp_path, capsys):
    base = experiment("base")
    base.update(make_config(images).to_dict())
    config = base.to_dict()
    config_file = tmp_path / "config.py"
    config_file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    arguments = [f"--config={config_file}", f"--workdir={workdir}"]
    assert runner.run("tokenize", arguments) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:4:2])
    assert table["images"] == "27 (train 27)"
    assert table["rate"].endswith("img/s")
    assert storage.read_json(workdir / "config.json") == json.loads(json.dumps(config))
    assert runner.run("tokenize", ["--strict", f"--workdir={workdir}"]) == 0
    assert capsys.readouterr().out.startswith("all shards exist already: nothing to do")
    assert runner.run("tokenize", [*arguments, "--config.quantizer.levels=8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenbridge tokenize: error: ")
    assert error.count("\n") == 1


def test_description_is_written_whole(finished):
    written = storage.read_json(finished / "tokens" / shards.INFO_FILE)
    assert shards.DatasetInfo.from_json(written).to_json() == written
    assert written["splits"]["train"]["images"] == 27
    assert len(written["statistics"]["train"]["bits_by_channel"]) == 4
