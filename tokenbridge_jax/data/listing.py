"""Lists the pictures of folders, in the same way for all commands.

Pictures are recognised by their extension. Hidden files and folders are ignored, and so are the
folders of `JUNK`, which operating systems and programs create. Symbolic links are followed. Each
real folder is listed once, and a link to a folder that contains the link is ignored. A folder that
cannot be listed is an error, because missing pictures would change labels.
"""

import collections
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenbridge_jax.data.class_names import are_numbers
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError

EXTENSIONS = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}

# Folders, in lower case, of macOS, ext4, chkdsk and Windows, NAS systems, Android and Python.
JUNK = {
    *("__macosx", "lost+found", "found.000", "system volume information", "$recycle.bin"),
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("lost.dir", "__pycache__"),
}


def is_picture(name: str) -> bool:
    """Whether a file of this name counts as a picture."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def is_junk(name: str) -> bool:
    """Whether files and folders of this name are ignored."""
    return name.startswith(".") or name.lower() in JUNK


def list_pictures(folder: str | os.PathLike[str], *, deep: bool = True) -> list[str]:
    """The pictures in a folder and, if `deep`, in the folders in it.

    Returns:
      Paths relative to the folder, with "/" as separator, sorted as text.

    Raises:
      UserError: a folder cannot be read, or a link's target does not exist.
    """
    return sorted(_collect(os.fspath(folder), [_top(folder)], deep).get("", []))


def list_classes(root: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The class folders in a folder, each with its pictures, as paths relative to `root`.

    Names that are all whole numbers are sorted as numbers, others as text.

    Raises:
      UserError: as `list_pictures`; or two class folders are the same number; or one folder
        belongs to two classes.
    """
    _, folders = _read(os.fspath(root), _top(root))
    found = _collect(os.fspath(root), [f._replace(label=f.path) for f in folders], deep=True)
    return {name: sorted(found[name]) for name in sort_names(found)}


def sort_names(names: Iterable[str]) -> list[str]:
    """Sorts names of class folders: as numbers if all are whole numbers, otherwise as text.

    Raises:
      UserError: two are the same number.
    """
    names = sorted(names)
    if not are_numbers(names):
        return names
    names.sort(key=int)
    for one, other in itertools.pairwise(names):
        if int(one) == int(other):
            raise UserError(f"the class folders {one} and {other} are the same number; rename one")
    return names


class _Folder(NamedTuple):
    """A folder to be listed.

    Attributes:
      label: the class of its pictures.
      path: relative to the folder where the listing began.
      real: the path without links; for a link, that of the folder that contains it.
      is_link: whether it is a link.
    """

    label: str
    path: str
    real: str
    is_link: bool


def _top(folder: str | os.PathLike[str]) -> _Folder:
    return _Folder("", "", os.path.realpath(folder), False)


def _collect(top: str, folders: list[_Folder], deep: bool) -> dict[str, list[str]]:
    """The pictures of these folders by label, as paths relative to `top`."""
    found: dict[str, list[str]] = {}
    listed: dict[str, _Folder] = {}
    # Links come last, so that a folder is listed by its own name where it has one.
    waiting = collections.deque(sorted(folders, key=lambda folder: folder.is_link))
    while waiting:
        folder = waiting.popleft()
        if folder.is_link:
            real = os.path.realpath(os.path.join(top, folder.path))
            if any(Path(p).is_relative_to(real) for p in (folder.real, os.path.realpath(top))):
                continue  # It leads to a folder that contains it.
            folder = folder._replace(real=real)
        other = listed.setdefault(folder.real, folder)
        if other.label != folder.label:
            raise UserError(
                f"{os.path.join(top, folder.path)} is the same folder as {other.path}, and its "
                "pictures would be of two classes; remove the link"
            )
        if other is folder:
            pictures, inside = _read(top, folder)
            found.setdefault(folder.label, []).extend(pictures)
            for each in inside if deep else ():
                waiting.append(each) if each.is_link else waiting.appendleft(each)
    return found


def _read(top: str, folder: _Folder) -> tuple[list[str], list[_Folder]]:
    """The pictures and folders directly in a folder."""
    path = os.path.join(top, folder.path)
    prefix = f"{folder.path}/" if folder.path else ""
    pictures, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if is_junk(name):
                    continue
                if entry.is_dir():
                    link = entry.is_symlink()
                    real = folder.real if link else os.path.join(folder.real, name)
                    folders.append(_Folder(folder.label, prefix + name, real, link))
                elif is_picture(name):
                    # A link without a target is a broken picture: reading it is an error.
                    if entry.is_file() or _is_dangling(entry):
                        pictures.append(prefix + name)
                elif _is_dangling(entry):
                    raise UserError(
                        f"the link {os.path.join(path, name)} leads to {os.readlink(entry.path)}, "
                        "which does not exist; mount or restore it, or remove the link"
                    )
    except OSError as error:
        raise storage.read_error(error.filename or path, error) from error
    return pictures, folders


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)
