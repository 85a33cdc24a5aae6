"""JPEGs that lost data are detected, and complete ones of every kind are not."""

import io

import numpy as np
import pytest
from PIL import Image
from test_images import SAMPLE

from tokenbridge_jax.data.images import ImageError, prepare

Y, X = np.mgrid[:96, :120]
NOISE = np.random.default_rng(0).integers(0, 60, (96, 120, 3))
PICTURE = (np.stack([X, Y, X ^ Y], axis=-1) + NOISE).astype(np.uint8)
KINDS = (
    {},
    {"subsampling": 0},
    {"optimize": True},
    {"restart_marker_rows": 1},
    {"progressive": True},
)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("pixels", [PICTURE, PICTURE[..., 0]], ids=["colours", "grey"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_data_that_end_early_are_detected(options, pixels):
    data = jpeg(pixels, **options)
    for share in (0.3, 0.5, 0.7, 0.9):
        cut = data[: int(len(data) * share)].rstrip(b"\xff") + b"\xff\xd9"
        assert decoded(cut).shape == (96, 120, 3)  # Pillow does not complain.
        with pytest.raises(ImageError, match="its data end early"):
            prepare(Image.open(io.BytesIO(cut)), 96)


def test_a_lost_block_is_detected(tmp_path):
    data = jpeg(PICTURE)
    half = len(data) // 2
    lost = data[:half] + bytes(2048) + data[half + 2048 :]
    assert decoded(lost).shape == (96, 120, 3)
    (tmp_path / "x.jpg").write_bytes(lost)
    with pytest.raises(ImageError, match=r"a part of its data is lost|its data end early"):
        prepare(Image.open(tmp_path / "x.jpg"), 96)
    with pytest.raises(ImageError, match="its data end early"):
        prepare(Image.open(io.BytesIO(data[:half] + data[half + 2048 :])), 96)


def test_complete_pictures_are_accepted():
    flat = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)]
    bottom = PICTURE.copy()
    bottom[48:] = 128
    for pixels in (PICTURE, *flat, bottom, PICTURE[:, :, 0], PICTURE[:7, :7]):
        for options in KINDS:
            data = jpeg(pixels, **options)
            side = min(pixels.shape[:2])
            left, top = (pixels.shape[1] - side) // 2, (pixels.shape[0] - side) // 2
            expected = decoded(data)[top : top + side, left : left + side]
            odd = data[:-2] + bytes(20) + data[-2:]  # "Extraneous bytes", as ImageNet has them.
            for file in (data, odd, data + bytes(5000)):
                np.testing.assert_array_equal(prepare(Image.open(io.BytesIO(file)), side), expected)
    # Zeros that encode a flat area, and zeros outside the picture's data.
    large = jpeg(np.full((2048, 2048), 77, np.uint8), optimize=True, comment=bytes(2000))
    assert (prepare(Image.open(io.BytesIO(large)), 64, 1) == 77).all()
    picture = io.BytesIO()
    Image.fromarray(PICTURE).convert("CMYK").save(picture, "JPEG")
    prepare(Image.open(picture), 96)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="TOKENBRIDGE_IMAGENET_SAMPLE is not set")
def test_real_photographs_are_whole():
    for path in sorted(SAMPLE.rglob("*.JPEG"))[::10]:
        data = path.read_bytes()
        prepare(Image.open(io.BytesIO(data)), 64)
        cut = data[: len(data) * 3 // 4].rstrip(b"\xff") + b"\xff\xd9"
        with pytest.raises(ImageError):
            prepare(Image.open(io.BytesIO(cut)), 64)
