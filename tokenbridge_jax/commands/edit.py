"""Edits pictures: redraws parts of them with WORKDIR/checkpoints and WORKDIR/autoencoder.

Pictures are resized and cropped to a square, as in `tokenize`. --mask or --box names the part to
redraw. --keep gives variations of the whole picture or of that part. --outpaint adds margins.
Writes PICTURE-0.png, PICTURE-1.png, ... and `edits.png`, a sheet with one row per picture: the
original, the mask, the edits. Beside them, `settings.json` says what they depend on; a folder with
edits of other pictures or settings is refused.

`config.sampling` has the settings, as for `tokenbridge sample`.
"""

import contextlib
import glob
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Bool, UInt8

from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import define_path
from tokenbridge_jax.commands.trained import load_pipeline
from tokenbridge_jax.config import sampling_settings
from tokenbridge_jax.data.images import ImageError, center_crop, decode, open_picture
from tokenbridge_jax.data.listing import EXTENSIONS, is_junk, is_picture, list_pictures
from tokenbridge_jax.evaluation import generation
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.pipeline.description import ClassId
from tokenbridge_jax.runtime import pictures, storage
from tokenbridge_jax.runtime.errors import UserError

ROWS_OF_SHEET = 20
SHEET = "edits.png"
SIDES = ("left", "top", "right", "bottom")


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this command."""

    def define(kind: Callable[..., Any], name: str, default: Any, help_text: str) -> None:
        kind(name, default, help_text, flag_values=flag_values)

    shares = "as shares of the side of the cropped square"
    mask = (
        "A picture whose white pixels are redrawn; as large as the pictures or the model's images."
    )
    encode_hidden = (
        "Let the encoder see the part to redraw, for touch-ups that resemble it. By default it "
        "sees that part only with --keep."
    )
    classes = (
        "Classes by number or name; the edits of a picture cycle through them. Or a mixture, "
        "207:0.5,388:0.5; or none."
    )
    blend = (
        "Put the original pixels back where nothing was drawn, with a ramp of this many pixels. By "
        "default the autoencoder decodes those pixels."
    )
    define_path("input", "A picture, a folder of pictures, or a glob.", flag_values)
    define_path("mask", mask, flag_values)
    define(flags.DEFINE_list, "box", None, f"Instead of a mask: left,top,width,height {shares}.")
    define(flags.DEFINE_float, "keep", None, "Share of the positions to keep, chosen at random.")
    define(flags.DEFINE_boolean, "encode_hidden", None, encode_hidden)
    define(flags.DEFINE_list, "outpaint", None, f"Margins: left,top,right,bottom {shares}.")
    define(flags.DEFINE_list, "classes", "none", classes)
    define(flags.DEFINE_integer, "num_images", 1, "Number of edits of every picture.")
    define(flags.DEFINE_integer, "blend", None, blend)
    define(flags.DEFINE_integer, "seed", 0, "Fixes all randomness.")
    define(flags.DEFINE_integer, "step", None, "Step of the checkpoint; the latest by default.")
    define_path("output", "Folder to write to instead of WORKDIR/edits.", flag_values)


def main(args: flags.FlagValues) -> None:
    """Edits and writes the files."""
    if args.num_images < 1:
        raise UserError(f"--num_images={args.num_images} must be at least 1")
    if args.mask and args.box:
        raise UserError("--mask and --box both name the part to redraw; give one of them")
    if args.outpaint and args.keep is not None:
        raise UserError("--keep redraws inside a picture; give either --keep or --outpaint")
    if not (args.mask or args.box or args.outpaint or args.keep is not None):
        raise UserError("name the part to redraw: --mask, --box, --keep or --outpaint")
    paths = picture_paths(args.input)
    count = args.num_images
    output = storage.check_folder(args.output or epath.Path(args.workdir) / "edits")
    check_output(output, args.input, paths, count, args.mask)
    class_ids = parse_classes(args.classes)
    box, outpaint = (parse_shares(name, args[name].value) for name in ("box", "outpaint"))
    pipeline = load_pipeline(args)

    patch, side = pipeline.patch_size, pipeline.image_size
    channels = pipeline.codec.config.image_channels
    crops, sizes = zip(*(read_picture(path, side, channels) for path in paths), strict=True)
    images = np.stack(crops)
    mask = None if box is None else box_mask(box, side)
    if args.mask:
        mask = read_mask(args.mask, side, set(sizes))

    settings: dict[str, Any] = dict(
        class_id=list(np.resize(np.array(class_ids, object), count)) * len(images),
        mask=mask,
        blend=args.blend,
        seed=args.seed,
        progress=True,
        **args.config.sampling,
    )
    repeated = np.repeat(images, count, axis=0)
    pixels = [patch * round(share * side / patch) for share in outpaint or (0, 0, 0, 0)]
    margins = dict(zip(SIDES, pixels, strict=True))
    seen = args.encode_hidden
    facts = _facts(args, pipeline, paths, images, mask, class_ids, margins)
    generation.claim_folder(output, facts, write=False)
    if outpaint is None:
        edited = pipeline.edit(repeated, keep=args.keep, encode_hidden=seen, **settings)
    elif any(pixels) or mask is not None:
        edited = pipeline.outpaint(repeated, encode_hidden=bool(seen), **settings | margins)
    else:
        raise UserError(
            f"--outpaint={','.join(map(str, outpaint))} rounds to nothing: margins are "
            f"multiples of {patch} of {side} pixels"
        )
    generation.claim_folder(output, facts)
    if jax.process_index() > 0:
        return  # Every process has all the images; one writes them.
    for i, image in enumerate(edited):
        pictures.write_png(output / edit_name(paths[i // count], i % count), image)
    pictures.write_png(output / SHEET, sheet(images, mask, edited, margins))
    print(f"wrote {len(edited)} edits and edits.png to {output}")


def _facts(
    args: flags.FlagValues,
    pipeline: Pipeline,
    paths: list[Path],
    images: UInt8[np.ndarray, "B H W I"],
    mask: Bool[np.ndarray, "H W"] | None,
    class_ids: list[ClassId],
    margins: dict[str, int],
) -> dict[str, Any]:
    """What determines the files of a folder."""
    settings = sampling_settings(args.config.sampling)
    drawn = generation.describe(pipeline, settings, labels={"classes": class_ids}, seed=args.seed)
    return {
        "pictures": [path.name for path in paths],
        "pictures_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "mask": "" if mask is None else hashlib.sha256(mask.tobytes()).hexdigest(),
        "margins": margins,
        **{name: args[name].value for name in ("num_images", "keep", "encode_hidden", "blend")},
        **drawn,
    }


def picture_paths(given: str | None) -> list[Path]:
    """Lists the pictures of --input: a file, a folder or a glob. They are sorted.

    Raises:
      UserError: there are none, or the edits of two would have the same name.
    """
    if not given:
        raise UserError("--input is not set; name a picture, a folder of pictures or a glob")
    if Path(given).is_file():
        return [Path(given)]
    if Path(given).is_dir():
        paths = [Path(given) / name for name in list_pictures(given, deep=False)]
    elif glob.has_magic(given):
        paths = _matching(given)
    else:
        raise UserError(f"--input={given} does not exist")
    if not paths:
        raise UserError(f"--input={given} holds no pictures ({', '.join(sorted(EXTENSIONS))})")
    by_name: dict[str, Path] = {}
    for path in paths:
        other = by_name.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"the edits of {other} and {path} would have one name; rename one")
    return paths


def edit_name(path: Path, number: int) -> str:
    """The file name of a picture's edit."""
    return f"{path.stem}-{number}.png"


def check_output(
    output: epath.PathLike, given: str, paths: list[Path], count: int, mask: str | None = None
) -> None:
    """Checks where the edits will be written, before anything is drawn.

    Args:
      output: the folder to write to.
      given: --input.
      paths: the pictures.
      count: number of edits of every picture.
      mask: --mask.

    Raises:
      UserError: an input file would be overwritten, the same command would edit the edits next
        time, or a file name would be too long.
    """
    for path in paths:
        storage.check_name(edit_name(path, count - 1))
    if storage.in_object_store(output):
        return
    folder = Path(output).resolve()
    if Path(given).is_dir() and Path(given).resolve() == folder:
        raise UserError(f"--output={output} is the folder of the pictures; name another one")
    written = {SHEET} | {edit_name(path, i) for path in paths for i in range(count)}
    for path in [*paths, *([Path(mask)] if mask else [])]:
        if path.parent.resolve() == folder and path.name in written:
            raise UserError(
                f"--output={output}: {path} would be overwritten by an edit; name another folder"
            )


def _matching(pattern: str) -> list[Path]:
    """Pictures that a glob matches, each once; those in junk folders only if it names these."""
    found: dict[str, Path] = {}
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        wild = set(path.parent.parts) - set(Path(pattern).parts)
        if is_picture(path.name) and path.is_file() and not any(map(is_junk, wild)):
            place = os.path.join(os.path.realpath(path.parent), path.name)
            other = found.setdefault(place, path)
            if len(path.parts) < len(other.parts):
                found[place] = path
    return sorted(found.values())


def parse_classes(parts: list[str]) -> list[ClassId]:
    """`207,cat` -> two classes; `207:0.5,cat:0.5` -> a mixture; `none` or nothing -> no class.

    Raises:
      UserError: a text has a colon, but together they are not a mixture.
    """
    if not any(":" in part for part in parts):
        return [None if part == "none" else part for part in parts or ["none"]]
    try:
        pairs = [part.rsplit(":", 1) for part in parts]
        return [{name: float(weight) for name, weight in pairs}]
    except ValueError:
        raise UserError(
            f"--classes={','.join(parts)} is no mixture; write CLASS:WEIGHT,CLASS:WEIGHT with "
            "weights that sum to 1"
        ) from None


def parse_shares(flag: str, parts: list[str] | None) -> tuple[float, ...] | None:
    """Reads the four numbers of a flag, which are 0 or more; None if it is not set.

    Raises:
      UserError: they are not four such numbers.
    """
    if parts is None:
        return None
    with contextlib.suppress(ValueError):
        shares = tuple(map(float, parts))
        if len(shares) == 4 and all(0 <= share < np.inf for share in shares):
            return shares
    raise UserError(
        f"--{flag}={','.join(parts)} must be four shares, 0 or more, such as 0.25,0.25,0.5,0.5"
    )


def read_picture(
    path: Path, side: int, channels: int
) -> tuple[UInt8[np.ndarray, "H W I"], tuple[int, int]]:
    """Reads a picture and crops it to the model's size; returns its original size too.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with open_picture(path) as image:
            whole = decode(image, channels)
            return center_crop(whole, side), whole.size
    except (OSError, ImageError) as error:
        raise UserError(f"cannot read the picture {path} ({error})") from error


def read_mask(path: str, side: int, sizes: set[tuple[int, int]]) -> Bool[np.ndarray, "H W"]:
    """Returns the white pixels of a mask, which is cropped like the pictures.

    Raises:
      UserError: it cannot be read, or has neither the size of all pictures nor that of the model.
    """
    pixels, size = read_picture(Path(path), side, 1)
    if size != (side, side) and sizes != {size}:
        width, height = min(sizes - {size})
        raise UserError(
            f"--mask={path} is {size[0]}x{size[1]} pixels, a picture {width}x{height}; make it as "
            f"large, or {side}x{side}"
        )
    return pixels[..., 0] >= 128


def box_mask(box: tuple[float, ...], side: int) -> Bool[np.ndarray, "H W"]:
    """Returns a mask with a rectangle: left, top, width and height as shares of the square.

    Raises:
      UserError: the rectangle does not fit into the square, or is empty.
    """
    left, top, width, height = box
    if max(left + width, top + height) > 1 + 1e-9:
        raise UserError(f"--box={','.join(map(str, box))} ends outside the picture, at more than 1")
    mask = np.zeros((side, side), bool)
    rows, columns = (
        slice(round(start * side), round((start + extent) * side))
        for start, extent in ((top, height), (left, width))
    )
    mask[rows, columns] = True
    if not mask.any():
        raise UserError(f"--box={','.join(map(str, box))} is smaller than one of {side} pixels")
    return mask


def sheet(
    images: UInt8[np.ndarray, "B H W I"],
    mask: Bool[np.ndarray, "H W"] | None,
    edited: UInt8[np.ndarray, "E height width I"],
    margins: dict[str, int],
) -> UInt8[np.ndarray, "sheetH sheetW I"]:
    """Makes a picture with one row per input picture: the original, the mask, the edits."""
    around = (margins["top"], margins["bottom"]), (margins["left"], margins["right"])
    if mask is None:
        mask = np.full(images.shape[1:3], not any(margins.values()))
    shown = 255 * np.pad(mask, around, constant_values=True).astype(np.uint8)
    shown = np.broadcast_to(shown[..., None], edited.shape[1:])
    originals = np.pad(images, [(0, 0), *around, (0, 0)], constant_values=pictures.GAP_VALUE)
    rows = np.split(edited, len(images))[:ROWS_OF_SHEET]
    cells = [
        cell for image, row in zip(originals, rows, strict=False) for cell in (image, shown, *row)
    ]
    return pictures.grid(np.stack(cells), columns=2 + len(rows[0]))


if __name__ == "__main__":
    sys.exit(runner.main(["edit", *sys.argv[1:]]))
