"""The crop against ADM's description in numpy, and pictures of every kind."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenbridge_jax.data import images, sources
from tokenbridge_jax.data.images import ImageError, center_crop, prepare

SAMPLE = Path(
    os.environ.get("TOKENBRIDGE_IMAGENET_SAMPLE")
    or Path(__file__).parent.parent.parent / "shared" / "imagenet-sample"
)


def halve(pixels: np.ndarray) -> np.ndarray:
    """A box filter from (h, w) to (h // 2, w // 2), also for odd sizes, rounded as Pillow does."""
    for axis in (1, 0):  # Pillow resizes rows first and rounds in between.
        pixels = np.moveaxis(pixels, axis, 0)
        n, half = len(pixels), len(pixels) // 2
        if n == 2 * half:
            mean = (pixels[0::2].astype(np.float64) + pixels[1::2]) / 2
        else:
            # Output i averages the inputs within half a window of its centre. In the middle of an
            # odd length the result depends on rounding, so the arithmetic is Pillow's.
            windows = []
            for centre in (np.arange(half) + 0.5) * (n / half):
                x = np.arange(n) - centre + 0.5
                inside = (x * (1.0 / (n / half)) > -0.5) & (x * (1.0 / (n / half)) <= 0.5)
                inside[: int(centre - 0.5 * (n / half) + 0.5)] = False
                windows.append(pixels[inside].mean(axis=0))
            mean = np.stack(windows)
        pixels = np.moveaxis(np.floor(mean + 0.5).astype(np.uint8), 0, axis)
    return pixels


def bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic filter (a = -0.5) with explicit weights, rounded between the axes."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    def resize(pixels: np.ndarray, axis: int, size: int) -> np.ndarray:
        pixels = np.moveaxis(pixels, axis, 0)
        scale = len(pixels) / size
        stretch = max(scale, 1.0)
        centres = (np.arange(size) + 0.5) * scale
        weights = kernel((np.arange(len(pixels)) + 0.5 - centres[:, None]) / stretch)
        weights /= weights.sum(axis=1, keepdims=True)
        resized = np.einsum("oi,i...->o...", weights, pixels.astype(np.float64))
        return np.moveaxis(np.clip(np.floor(resized + 0.5), 0, 255).astype(np.uint8), 0, axis)

    if width != pixels.shape[1]:
        pixels = resize(pixels, 1, width)
    return resize(pixels, 0, height) if height != pixels.shape[0] else pixels


def adm(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop, from its description, without Pillow."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halve(pixels)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    pixels = bicubic(pixels, round(height * scale), round(width * scale))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(image: Image.Image, format: str, **options) -> Image.Image:
    """The picture as read from a file of this format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        *[(40, 40, 16), (64, 64, 16), (31, 32, 16), (33, 47, 16), (130, 65, 16), (129, 203, 32)],
        *[(5, 9, 16), (1, 1, 8), (3, 31, 8), (16, 16, 16), (16, 21, 16)],
    ],
)
def test_crop_is_adms(height, width, size):
    pixels = noise(height, width, seed=height)
    ours = center_crop(Image.fromarray(pixels), size)
    assert ours.shape == (size, size, 3)
    assert ours.dtype == np.uint8
    # Pillow's fixed-point weights may round a tie the other way.
    difference = np.abs(ours.astype(int) - adm(pixels, size))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.02


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="TOKENBRIDGE_IMAGENET_SAMPLE is not set")
def test_crop_of_real_photographs_is_adms():
    source = sources.FolderSource(SAMPLE)
    for i in range(0, len(source), max(1, len(source) // 12)):
        image, _ = source.load(i)
        ours, _ = sources.load_prepared(source, i, 256, 3)
        difference = np.abs(ours.astype(int) - adm(np.asarray(image.convert("RGB")), 256))
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 0.01


def test_grey_becomes_rgb_and_rgb_grey():
    grey = noise(20, 20, 1)
    assert np.array_equal(prepare(Image.fromarray(grey), 20, 3), np.stack([grey] * 3, axis=-1))
    assert np.array_equal(prepare(Image.fromarray(grey), 20, 1)[..., 0], grey)
    rgb = noise(20, 20)
    luma = rgb @ np.array([299, 587, 114]) / 1000
    assert np.abs(prepare(Image.fromarray(rgb), 20, 1)[..., 0] - luma).max() <= 1


def test_cmyk_jpeg():
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 1:3] = 255  # Full magenta and yellow: red.
    red = prepare(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100), 16)
    assert red[..., 0].min() > 250
    assert red[..., 1:].max() < 5


def test_palettes_and_transparency_keep_the_stored_colours():
    colours = np.array([[200, 10, 30], [0, 90, 250], [7, 7, 7]], np.uint8)
    places = np.random.default_rng(0).integers(0, 3, (12, 12)).astype(np.uint8)
    expected = colours[places]
    image = Image.fromarray(places, "L")
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    assert np.array_equal(prepare(encoded(image, "PNG"), 12), expected)
    for transparency in (1, b"\x00\x80\xff"):  # One transparent entry, or alpha for every entry.
        transparent = encoded(image, "PNG", transparency=transparency)
        assert transparent.mode == "P"
        assert np.array_equal(prepare(transparent, 12), expected)
    rgba = np.dstack([expected, places * 80])
    assert np.array_equal(prepare(encoded(Image.fromarray(rgba), "PNG"), 12), expected)
    grey_alpha = Image.merge("LA", [Image.fromarray(places * 100), Image.fromarray(places)])
    assert np.array_equal(prepare(encoded(grey_alpha, "PNG"), 12, 1)[..., 0], places * 100)


def test_bilevel():
    bits = noise(9, 9, 1) > 127
    ours = prepare(encoded(Image.fromarray(bits), "PNG"), 9)
    assert np.array_equal(ours, np.stack([bits * np.uint8(255)] * 3, axis=-1))


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    expected = np.round(deep / 257).astype(np.uint8)
    from_png = encoded(Image.fromarray(deep), "PNG")
    assert from_png.mode == "I;16"
    for image in (from_png, Image.fromarray(deep.astype(np.int32))):  # The latter is mode "I".
        assert np.array_equal(prepare(image, 32, 1)[..., 0], expected)
        assert np.array_equal(prepare(image, 32, 3)[..., 2], expected)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_orientation_is_applied(orientation):
    stored = noise(10, 10, seed=1)
    # The meaning of every orientation in the EXIF standard.
    shown = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }.get(orientation, stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(prepare(encoded(Image.fromarray(stored), "PNG", exif=exif), 10), shown)
    # Pillow turns TIFFs itself, so they must not be turned again.
    tiff = encoded(Image.fromarray(stored), "TIFF", tiffinfo={0x0112: orientation})
    assert np.array_equal(prepare(tiff, 10), shown)


def test_unreadable_exif_counts_as_none():
    pixels = noise(8, 8)
    image = encoded(Image.fromarray(pixels), "PNG", exif=b"Exif\x00\x00garbage garbage")
    assert np.array_equal(prepare(image, 8), pixels)


def test_huge_picture(tmp_path):
    # Pillow refuses 225 megapixels, but here they are allowed.
    Image.new("L", (15000, 15000), 77).save(tmp_path / "huge.png", compress_level=1)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "huge.png")
    for file in (tmp_path / "huge.png", io.BytesIO((tmp_path / "huge.png").read_bytes())):
        assert images.open_picture(file).size == (15000, 15000)
    assert np.all(prepare(images.open_picture(tmp_path / "huge.png"), 8, 1) == 77)


@pytest.mark.parametrize("size", [(2**16, 2**14), (1, 2**20)])
def test_excessive_pictures_are_refused(size):
    # The second is small, but its short side is 1, so it would become 32 x 33 million pixels.
    image = Image.new("L", (1, 1))
    image = image.resize(size) if size[0] == 1 else _Pretends(size)
    with pytest.raises(ImageError, match="pixels are more than"):
        prepare(image, 32, 1)


class _Pretends(Image.Image):
    """A picture that claims a size without allocating it."""

    def __init__(self, size):
        super().__init__()
        self._size = size


def test_pillows_own_limit_is_left_alone(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3
    file = io.BytesIO()
    Image.fromarray(noise(10, 10)).save(file, "BMP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(images.decode(images.open_picture(file)), noise(10, 10))
    with pytest.raises(OSError, match="cannot identify"):
        images.open_picture(io.BytesIO(b"no picture"))


def tiff(pixels: np.ndarray, **options) -> Image.Image:
    return encoded(Image.fromarray(pixels), "TIFF", **options)


def test_the_white_of_deep_grey():
    rng = np.random.default_rng(0)
    twelve = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
    twelve[0, :2] = 0, 4095
    expected = np.floor(twelve.astype(float) * 255 / 4095 + 0.5)
    for tag in (281, 341):  # MaxSampleValue, SMaxSampleValue.
        image = tiff(twelve, tiffinfo={tag: 4095})
        assert np.array_equal(prepare(image, 16, 1)[..., 0], expected)
    # Without a tag white is not guessed, whether in a TIFF, in a PNG or in three colours.
    for image in (tiff(twelve), encoded(Image.fromarray(twelve), "PNG"), deep_rgb(twelve)):
        with pytest.raises(ImageError, match="16-bit pixels of which none reaches a sixteenth"):
            prepare(image, 16, 3)
    # A largest value that is a statistic changes nothing, and black stays black.
    sixteen = twelve * 16
    scaled = np.round(sixteen / 257)
    for image in (tiff(sixteen, tiffinfo={281: int(sixteen.max())}), tiff(sixteen)):
        assert np.array_equal(prepare(image, 16, 1)[..., 0], scaled)
    assert np.array_equal(prepare(deep_rgb(sixteen), 16)[..., 1], sixteen >> 8)
    assert not prepare(tiff(np.zeros((9, 9), np.uint16)), 9).any()


def deep_rgb(grey: np.ndarray) -> Image.Image:
    """A PNG with 16 bits per colour, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        content = kind + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    height, width = grey.shape
    rows = np.stack([grey] * 3, axis=-1).astype(">u2").reshape(height, -1).view(np.uint8)
    lines = np.pad(rows, ((0, 0), (1, 0)))  # Filter 0 in front of every line.
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return Image.open(io.BytesIO(data))


def test_pictures_without_a_known_white_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        prepare(Image.fromarray(np.ones((8, 8), np.float32)), 8)
    pixels = np.random.default_rng(0).integers(0, 2**20, (8, 8)).astype(np.int32)
    with pytest.raises(ImageError, match="32-bit integer pixels, whose white is unknown"):
        prepare(tiff(pixels), 8)
    expected = np.floor(pixels.astype(float) * 255 / (2**20 - 1) + 0.5)
    image = tiff(pixels, tiffinfo={341: 2**20 - 1})
    assert np.array_equal(prepare(image, 8, 1)[..., 0], expected)
