"""Detects JPEGs whose data end before the picture is complete, although an end mark follows.

libjpeg fills the rest of such a picture with grey and gives a warning, which Pillow does not pass
on. Here the file is decoded a second time, with other bytes between its data and the mark. A
complete picture does not change, because its decoder never reaches them. The second decoding is
needed only if the last pixel has the grey of libjpeg, or if the file is progressive, where missing
data leave no grey.

A sector of zeros in the data also shows that a part is lost, unless zeros encode a flat area.
"""

import io
import re
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

# A marker that ends the data of a scan: neither a stuffed byte nor a restart marker.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Markers of frames with Huffman codes. Other codes may omit zeros at the end of their data.
_HUFFMAN, _PROGRESSIVE = (0xC0, 0xC1, 0xC2), 0xC2
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}

_HUFFMAN_TABLES = 0xC4

_FILLING = b"\x55" * 256
_SECTOR = bytes(512)


def missing_data(data: bytes, image: Image.Image) -> str | None:
    """Describes the missing part of a file that Pillow decoded; None if it is complete.

    Args:
      data: the bytes of the file.
      image: the unchanged image that Pillow decoded from it.
    """
    frame, scans, zeros_are_flat = _read(data)
    if frame not in _HUFFMAN:
        return None
    last: Any = image.getpixel((image.width - 1, image.height - 1))
    # It is not exactly 128 where colours are interpolated between the last blocks.
    is_grey = bool(np.all(np.abs(np.array(last, int) - 128) <= 8))
    if is_grey or frame == _PROGRESSIVE:
        filled = bytearray(data)
        for _, end in reversed(scans):
            filled[end:end] = _FILLING
        if not _is_same(filled, image):
            return "its data end early; the missing part would be grey or blurred"
    elif not zeros_are_flat and any(data.find(_SECTOR, *scan) >= 0 for scan in scans):
        return "a part of its data is lost: there are zeros in its place"
    return None


def _read(data: bytes) -> tuple[int, list[tuple[int, int]], bool]:
    """The frame's marker, the range of every scan's data, and whether zeros encode a flat area.

    They do if the code of zeros means "no change" in the tables for the first coefficient and "no
    more" in those for the others. Both meanings are 0.
    """
    frame, scans, zeros_are_flat = 0, list[tuple[int, int]](), True
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        kind = data[place + 1]
        if kind == 0xFF:  # Any number of these may precede a marker.
            place += 1
            continue
        if kind == _END_OF_IMAGE:
            break
        segment = data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4])]
        place += 4 + len(segment)
        if kind in _HUFFMAN or kind in _OTHER_FRAMES:
            frame = kind
        elif kind == _HUFFMAN_TABLES:
            while len(segment) > 17:  # Its kind, how many codes of every length, their meanings.
                zeros_are_flat &= segment[17] == 0
                segment = segment[17 + sum(segment[1:17]) :]
        elif kind == _START_OF_SCAN:
            found = _END_OF_SCAN.search(data, place)
            end = found.start() if found else len(data)
            # Data cut after the first byte of a stuffed pair end with one more of these.
            scans.append((place, len(data[:end].rstrip(b"\xff"))))
            place = end
    return frame, scans, zeros_are_flat


def _is_same(data: bytes | bytearray, image: Image.Image) -> bool:
    """Whether these data decode to the same pixels, or cannot be decoded."""
    try:
        # Not `Image.open`, which refuses large ones.
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as other:
            return np.array_equal(np.asarray(other), np.asarray(image))
    except Exception:  # Pillow's decoders raise many kinds.
        return True
