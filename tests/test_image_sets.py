"""Sets of images, against numpy and Pillow."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from refusals import flipped, outcome
from token_shards import SETTINGS, make_info

from tokenbridge_jax.data.shards import write_info
from tokenbridge_jax.data.sources import make_source
from tokenbridge_jax.evaluation.features import ThumbnailExtractor
from tokenbridge_jax.evaluation.image_sets import data_images, open_images
from tokenbridge_jax.evaluation.scores import find_reference
from tokenbridge_jax.runtime.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)


def write_folder(folder, images=IMAGES):
    for i, image in enumerate(images):
        place = folder / f"class_{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:02d}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def read(images, size, first=0, last=None):
    return list(images.batches(size, first, images.count if last is None else last))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_batches(tmp_path, save):
    save(tmp_path / "x.npz", labels=np.arange(11), arr_0=IMAGES)
    images = open_images(tmp_path / "x.npz")
    assert (images.count, images.shape) == (11, (6, 5, 3))
    batches = read(images, 4)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    np.testing.assert_array_equal(np.concatenate(read(images, 2, 3, 8)), IMAGES[3:8])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_of_an_npz_is_reported_whatever_is_read(tmp_path, save):
    """Also if the images that are read are undamaged, because it is unknown which are."""
    path = tmp_path / "x.npz"
    save(path, IMAGES)
    whole = open_images(path)
    whole.take(2)
    expected = read(whole, 1)

    def some():
        images = open_images(path)
        images.take(2)
        return read(images, 1)

    reported = 0
    for bit in np.random.default_rng(0).choice(8 * path.stat().st_size, 60, replace=False):
        with flipped(path, int(bit)):
            found, message = outcome(some)
        assert bool(message) or np.array_equal(found, expected)
        assert "\n" not in message
        reported += bool(message)
    assert reported > 30


def test_the_shards_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    bounds = [0, 4, 5, 11]
    names = [f"x-{number:05d}-of-00003.npz" for number in range(3)]
    for number in (2, 0, 1):
        part = IMAGES[bounds[number] : bounds[number + 1]]
        np.savez(tmp_path / names[number], arr_0=part, labels=np.arange(len(part)))
    (tmp_path / "settings.json").write_text("{}")
    images = open_images(tmp_path)
    assert (images.count, images.shape) == (11, (6, 5, 3))
    for size in (1, 3, 11):
        np.testing.assert_array_equal(np.concatenate(read(images, size)), IMAGES)
    np.testing.assert_array_equal(np.concatenate(read(images, 4, 3, 8)), IMAGES[3:8])
    np.testing.assert_array_equal(images.load(np.array([9, 0, 4])), IMAGES[[9, 0, 4]])
    images.take(3)
    np.testing.assert_array_equal(np.concatenate(read(images, 2)), IMAGES[[0, 5, 10]])
    with flipped(tmp_path / names[2], 8 * 400), pytest.raises(UserError, match="damaged"):
        read(open_images(tmp_path), 4)

    def refused(message):
        with pytest.raises(UserError, match=message):
            open_images(tmp_path)

    np.savez(tmp_path / names[1], arr_0=IMAGES[:1, :4])
    refused(r"several sizes \(x-00000-of-00003.npz 5x6 and x-00001-of-00003.npz 5x4\)")
    np.savez_compressed(tmp_path / names[1], arr_0=IMAGES[4:5])
    refused("00001-of-00003.npz is compressed")
    (tmp_path / names[1]).unlink()
    refused(r"x-00001-of-00003.npz is missing \(1 of 3 are\)")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    images = open_images(write_folder(tmp_path))
    assert (images.count, images.shape) == (11, (6, 5, 3))
    expected = np.concatenate([IMAGES[::2], IMAGES[1::2]])
    np.testing.assert_array_equal(np.concatenate(read(images, 4)), expected)
    np.testing.assert_array_equal(np.concatenate(read(images, 4, 5, 10)), expected[5:10])


def test_grey_pictures_become_rgb(tmp_path):
    Image.fromarray(IMAGES[0, :, :, 0]).save(tmp_path / "grey.png")
    np.savez(tmp_path / "x.npz", IMAGES[:1, :, :, :1])
    for path in (tmp_path, tmp_path / "x.npz"):
        (batch,) = read(open_images(path), 4)
        np.testing.assert_array_equal(batch[0], IMAGES[0, :, :, :1].repeat(3, axis=2))


@pytest.mark.parametrize("arrays", [{"mean": 1, "cov": 2}, {"mu": 1, "cov": 2}, {}])
def test_arrays_with_other_names_are_listed(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    held = ", ".join(sorted(arrays)) or "nothing"
    with pytest.raises(
        UserError, match=f"x.npz holds {held}: a reference must have .* mu and sigma"
    ):
        find_reference(tmp_path / "x.npz", None, ThumbnailExtractor())


def test_images_that_the_shards_left_out_are_left_out(tmp_path):
    """One picture of a class folder is broken; there are shards of this folder and of another."""
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "class_1" / "03.png").write_bytes(b"no picture")
    config = ConfigDict(SETTINGS)
    config.data.update(path=str(tmp_path / "data"), image_size=4)
    described = make_source(config.data).describe()

    def shards(name, **source):
        info = make_info(
            sources={"train": {**described, "path": "elsewhere", "chosen": 11, **source}},
            splits={},
            skipped=({"split": "train", "image": 7, "reason": "no picture"},),
        )
        write_info(tmp_path / name, info)
        return tmp_path / name

    images = data_images(config, "train", tokens=shards("tokens"))
    assert (images.count, images.facts["broken_left_out"]) == (10, 1)
    (batch,) = read(images, 16)
    assert batch.shape == (10, 4, 4, 3)
    for tokens in (None, tmp_path / "none", shards("others", names_sha256="of others")):
        images = data_images(config, "train", tokens=tokens)
        assert images.count == 11
        assert "broken_left_out" not in images.facts
        with pytest.raises(UserError, match=r"broken image class_1/03\.png"):
            read(images, 16)


def test_unusable_files_are_named(tmp_path):
    def refused(path, message, use=open_images):
        with pytest.raises(UserError, match=message):
            use(path)

    def read_four(path):
        return read(open_images(path), 4)

    refused(tmp_path / "none", "none does not exist; give a folder of pictures or an .npz")
    refused(tmp_path, "holds no pictures")
    (tmp_path / "x.txt").write_text("x")
    refused(tmp_path / "x.txt", "neither a folder nor an .npz file")
    (tmp_path / "x.npz").write_text("x")
    refused(tmp_path / "x.npz", "cannot be read: File is not a zip file")
    wrong = r"must be uint8 of shape \[N, H, W, 3\] or .*, not float32 \[11, 6, 5, 3\]"
    for arrays, message in [
        ({"images": IMAGES}, "has no array arr_0"),
        ({"arr_0": IMAGES.astype(np.float32)}, wrong),
        ({"arr_0": IMAGES[:0]}, "arr_0 holds no images"),
    ]:
        np.savez(tmp_path / "x.npz", **arrays)
        refused(tmp_path / "x.npz", message)

    folder = write_folder(tmp_path / "mixed")
    Image.fromarray(IMAGES[0, :4]).save(folder / "class_1" / "small.png")
    refused(folder, r"several sizes \(00.png 5x6 and small.png 5x4\)", read_four)
    (folder / "class_1" / "small.png").write_text("x")
    refused(folder, "small.png cannot be read as a picture", read_four)
