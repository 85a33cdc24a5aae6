"""One picture -> a uint8 square, cropped exactly as ADM crops it.

ADM ("Diffusion Models Beat GANs on Image Synthesis", and after it MAR and TokenBridge) halves a
picture with a box filter while its short side is at least twice the target. Then it resizes with a
bicubic filter and keeps the centre. Differences of two pixels are visible in FID, so nothing is
approximated. JPEG's draft mode, for example, is faster but gives other pixels.

Before the crop:

- Pixels are decoded in full. A picture whose file ends early is an `ImageError`, even a JPEG with
  an end mark (see `jpeg.py`). Overwritten data in the middle of a JPEG are not always detected.
- EXIF orientation is applied, so that pictures are stored as viewers show them. ADM ignores the
  tag. Nearly all pictures of ImageNet have none, and for these both agree.
- 16-bit pictures are scaled to 8 bits, where Pillow alone would clip grey ones to white. White is
  65535, or what the tags of a grey TIFF say about its bits or its largest value. Without such a tag
  a picture is an `ImageError` if no value reaches a sixteenth of white, because it most likely has
  12 bits. A picture of 14 bits without a tag becomes four times too dark.
- Pictures of 32-bit integers, signed integers or floats are an `ImageError`, because their white is
  unknown. Integers are accepted if the tags of a TIFF give the largest value.
- Pillow converts all other kinds to RGB (or grey), as in ADM: CMYK, palettes, grey. Transparency is
  dropped, and the colours beneath it are kept.
"""

import io
import os
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from tokenbridge_jax.data import jpeg

# Pictures with more pixels, in the file or after resizing, are refused as broken. Half a gigapixel
# takes 1.6 GB as RGB.
MAX_PIXELS = 2**29

# Tags of TIFF. The first tag of `_LARGEST` has priority over the second.
_BITS, _SAMPLE_FORMAT, _LARGEST = 258, 339, (341, 281)

_MODES = {1: "L", 3: "RGB"}

_DARK = (
    "16-bit pixels of which none reaches a sixteenth of white: most likely they have 12 bits or "
    "fewer; convert it to 8 bits"
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """A picture that cannot be used, and why."""


def open_picture(file: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """Like `Image.open`, without its guard against large pictures.

    Pillow warns from 89 megapixels on and refuses more than 179, but legitimate scans are larger.
    `decode` has its own limit. Pillow's limit is global and other code may rely on it, so it stays,
    and Pillow's readers are called here directly.

    Raises:
      OSError: the file cannot be read or is not a picture.
      ImageError: the picture is of a kind that cannot be that large.
    """
    stream = file if isinstance(file, io.BytesIO) else io.BytesIO(Path(file).read_bytes())
    start = stream.getvalue()[:16]
    for load_readers in (Image.preinit, Image.init):  # The common formats, then all.
        load_readers()
        for reader, accepts in [Image.OPEN[name] for name in Image.ID]:
            try:
                accepted = accepts is None or accepts(start)
                if accepted and not isinstance(accepted, str):
                    stream.seek(0)
                    return reader(stream, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # The file has another format, as in `Image.open`.
            except Image.DecompressionBombError as error:
                raise ImageError(str(error)) from error
    name = file if isinstance(file, io.BytesIO) else os.fspath(file)
    raise UnidentifiedImageError(f"cannot identify image file {name!r}")


def prepare(image: Image.Image, size: int, channels: int = 3) -> UInt8[np.ndarray, "size size c"]:
    """Decodes one picture, turns it upright, converts it to 8 bits and crops it.

    Args:
      image: as opened by Pillow, decoded or not.
      size: the side of the square in pixels.
      channels: 3 for RGB, 1 for grey.

    Raises:
      ImageError: the picture is damaged, far too large or of a kind whose white is unknown.
    """
    return center_crop(decode(image, channels), size)


def decode(image: Image.Image, channels: int = 3) -> Image.Image:
    """Decodes one picture, turns it upright and converts it to 8-bit `RGB` or `L`.

    Args and errors are those of `prepare`.
    """
    _check_size(image.size)
    try:
        data = _jpeg_data(image)
        # Later this is unknown: Pillow drops the lower 8 of 16 bits of colours when it decodes.
        is_deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        image.load()
        if data and (reason := jpeg.missing_data(data, image)):
            raise ImageError(reason)
        if is_deep and not image.mode.startswith("I") and _brightest(image) <= 255 // 16:
            raise ImageError(_DARK)
        return _upright(_to_8bit(image, channels), image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files.
        raise ImageError(str(error) or type(error).__name__) from error


def _jpeg_data(image: Image.Image) -> bytes | None:
    """The content of a JPEG's file, if the JPEG is not decoded yet."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or not getattr(image, "tile", ()) or file is None:
        return None
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return data


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size c"]:
    """ADM's centre crop of a decoded `L` or `RGB` picture of any size; small ones are enlarged."""
    while min(image.size) >= 2 * size:
        image = _resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    _check_size(target)
    image = _resize(image, target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, -1)


def _resize(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """Resizes rows first, then columns, as Pillow up to version 12 does by itself.

    Version 13 begins with the columns of tall pictures, which is faster. Pixels are rounded in
    between, so some of them would differ by several levels.
    """
    return image.resize((size[0], image.height), filter).resize(size, filter)


def _to_8bit(image: Image.Image, channels: int) -> Image.Image:
    """Converts a decoded picture of any mode to 8-bit `RGB` (`channels` 3) or `L` (1)."""
    if image.mode.startswith("I"):
        white = _white(image)
        # Pillow opens 16-bit grey PNGs as `I;16`, or in older versions as 32-bit `I`.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, white)
        if white == 65535 and 0 < np.max(grey) <= white // 16:
            raise ImageError(_DARK)
        image = Image.fromarray(((grey * 255 + white // 2) // white).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("floating-point pixels, whose white is unknown; convert it to 8 bits")
    elif image.mode == "P" and "transparency" in image.info:
        # A direct conversion gives the same colours, but warns if several are transparent.
        image = image.convert("RGBA")
    return image.convert(_MODES[channels])


def _white(image: Image.Image) -> int:
    """The value of white in grey pixels of more than 8 bits."""
    tags = getattr(image, "tag_v2", {})
    # Only a largest value of 2^n - 1 means white. Other values are statistics of the picture.
    for tag in _LARGEST:
        value = int(np.ravel(tags.get(tag, 0))[0])
        if value > 255 and value & (value + 1) == 0:
            return value
    bits = int(np.ravel(tags.get(_BITS, 16))[0])
    signed = int(np.ravel(tags.get(_SAMPLE_FORMAT, 1))[0]) != 1
    if bits > 16 or signed:
        kind = f"{'signed ' if signed else ''}{bits}-bit integer pixels"
        raise ImageError(f"{kind}, whose white is unknown; convert it to 8 bits")
    return 2**bits - 1


def _brightest(image: Image.Image) -> int:
    """The largest value of a colour or grey."""
    extrema = np.reshape(image.getextrema(), (-1, 2))
    bands = zip(image.getbands(), extrema, strict=True)
    return max(int(high) for band, (_, high) in bands if band != "A")


def _upright(converted: Image.Image, image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation of a decoded picture; unreadable EXIF data are ignored."""
    # This is read after decoding, when Pillow has already turned a TIFF and dropped the tag.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # A damaged tag does not mean that the pixels are damaged.
        orientation = None
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return converted if method is None else converted.transpose(method)


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{size[0]}x{size[1]} pixels are more than the {MAX_PIXELS} allowed")
