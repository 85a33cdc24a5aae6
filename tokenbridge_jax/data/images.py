"""One picture -> a uint8 square, cut exactly as ADM cuts it.

ADM ("Diffusion Models Beat GANs on Image Synthesis", and after it MAR and TokenBridge) halves the
picture with a box filter while its short side is at least twice the target, resizes the rest of
the way with a bicubic filter, and keeps the centre. Two pixels of difference here are visible in
FID, so nothing is approximated: JPEG draft mode, for one, is faster and not the same.

What comes before the cut, for pictures that are not plain RGB:

- Pixels are decoded in full first; a truncated file is an `ImageError`, never a half-grey picture.
- EXIF orientation is applied: pictures are stored the way a viewer shows them. (ADM ignores the
  tag; on pictures without one, so on nearly all of ImageNet, both agree.)
- 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white).
- Everything else goes through Pillow's conversion to RGB (or grey) as in ADM: CMYK, palettes,
  grey; transparency is dropped and the colours beneath it are kept.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

# Above this many pixels, in the file or on the way, a picture is refused as broken: half a
# gigapixel already takes 1.6 GB as RGB.
MAX_PIXELS = 2**29

# Pillow warns from 89 megapixels on and refuses from 179; legitimate scans are larger. Its limit
# is a global without a thread-safe way around, so it is lifted here and `MAX_PIXELS` checked.
Image.MAX_IMAGE_PIXELS = None

_MODES = {1: "L", 3: "RGB"}

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


def prepare(image: Image.Image, size: int, channels: int = 3) -> UInt8[np.ndarray, "size size c"]:
    """Decodes, turns upright, converts and cuts one picture.

    Args:
      image: as opened by Pillow; may still be undecoded.
      size: the side of the square in pixels.
      channels: 3 for RGB, 1 for grey.

    Raises:
      ImageError: the picture is damaged, far too large or of a kind without a known white.
    """
    _check_size(image.size)
    try:
        image.load()
        return center_crop(to_8bit(upright(image), channels), size)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise ImageError(str(error) or type(error).__name__) from error


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size c"]:
    """ADM's centre crop of a decoded `L` or `RGB` picture of any size, smaller ones included."""
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
    """Rows first, then columns, as every Pillow up to 12 does by itself.

    From 13 on it takes columns first where that is faster, for tall pictures; since pixels are
    rounded in between, some then differ by several levels.
    """
    return image.resize((size[0], image.height), filter).resize(size, filter)


def to_8bit(image: Image.Image, channels: int) -> Image.Image:
    """Converts a decoded picture of any mode to 8-bit `RGB` (`channels` 3) or `L` (1)."""
    if image.mode.startswith("I"):
        # 16-bit grey; PNGs of that kind open as `I;16` or, with older Pillow, as 32-bit `I`.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("floating-point pixels, whose white is unknown; convert it to 8 bits")
    elif image.mode == "P" and "transparency" in image.info:
        # The same colours as a direct conversion, which warns when several are transparent.
        image = image.convert("RGBA")
    return image.convert(_MODES[channels])


def upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation of a decoded picture; unreadable EXIF data counts as none."""
    # Read after decoding: for TIFF, Pillow itself turns the picture then and drops the tag.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # A damaged tag says nothing about the pixels.
        orientation = None
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{size[0]}x{size[1]} pixels are more than the {MAX_PIXELS} allowed")
