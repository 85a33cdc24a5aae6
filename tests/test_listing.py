"""Listing pictures: compared with the known content of trees, and with `os.walk` on a plain one."""

import os
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from tokenbridge_jax.commands import edit
from tokenbridge_jax.data import listing, sources
from tokenbridge_jax.data.listing import list_classes, list_pictures
from tokenbridge_jax.data.sources import FolderSource
from tokenbridge_jax.evaluation.image_sets import open_images
from tokenbridge_jax.runtime.errors import UserError


def plant(root, *names):
    """Empty files, which are enough for a listing; a name that ends in / is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def test_a_plain_tree_is_listed_as_by_os_walk(tmp_path):
    rng = random.Random(0)
    names = [
        f"n{rng.randrange(9)}/{'deep/' * rng.randrange(3)}{rng.randrange(10**6)}{suffix}"
        for suffix in (".JPEG", ".png", ".txt", "") * 25
    ]
    plant(tmp_path, *names)
    walked = [
        os.path.relpath(os.path.join(folder, name), tmp_path)
        for folder, _, files in os.walk(tmp_path)
        for name in files
        if name.endswith((".JPEG", ".png"))
    ]
    assert list_pictures(tmp_path) == sorted(walked)
    classes = list_classes(tmp_path)
    assert list(classes) == sorted({name.split("/")[0] for name in names})
    assert [name for files in classes.values() for name in files] == sorted(walked)


JUNK = (
    *("__MACOSX/._1.png", "lost+found/", "System Volume Information/", "$RECYCLE.BIN/1.png"),
    *("@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/1.png", ".Trashes/1.png", "._1.png"),
    *(".ipynb_checkpoints/1-checkpoint.png", "Thumbs.db", "desktop.ini", "#snapshot/1.png"),
)


def test_files_of_operating_systems_are_ignored(tmp_path):
    plant(tmp_path, "n01/1.TIF", "n02/2.webp", *JUNK, *(f"n01/{name}" for name in JUNK))
    assert list_classes(tmp_path) == {"n01": ["n01/1.TIF"], "n02": ["n02/2.webp"]}
    assert list_pictures(tmp_path) == ["n01/1.TIF", "n02/2.webp"]
    assert list_pictures(tmp_path / "n01", deep=False) == ["1.TIF"]


def test_every_command_lists_alike(tmp_path, monkeypatch):
    plant(tmp_path, *(f"0/{i}.{kind}" for i, kind in enumerate(sorted(listing.EXTENSIONS))), *JUNK)
    (tmp_path / "0" / "loop").symlink_to(tmp_path)
    expected = [tmp_path / name for name in list_pictures(tmp_path)]
    assert len(expected) == len(listing.EXTENSIONS)
    source = FolderSource(tmp_path)
    assert [tmp_path / source.name(i) for i in range(len(source))] == expected
    assert edit.picture_paths(str(tmp_path / "0")) == expected
    assert edit.picture_paths(f"{tmp_path}/**/*") == expected
    monkeypatch.setattr(
        "tokenbridge_jax.evaluation.image_sets._read_picture", lambda file: np.zeros((1, 1, 3))
    )
    assert open_images(tmp_path)._items.tolist() == expected


def test_links(tmp_path):
    root = plant(tmp_path / "root", "cat/1.png", "cat/2.png", "dog/3.png")
    store = plant(tmp_path / "store", "owl/4.png", "more/5.png")
    (root / "cat" / "cat").symlink_to(root / "cat")  # A loop, and two links to folders above.
    (root / "dog" / "all").symlink_to(root)
    (root / "above").symlink_to(tmp_path)
    (root / "owl").symlink_to(store / "owl")  # A class in another place,
    (root / "cat" / "more").symlink_to(store / "more")  # a part of a class, linked twice,
    (root / "cat" / "again").symlink_to(store / "more")
    (store / "more" / "back").symlink_to(root / "cat")
    (root / "cat" / "6.png").symlink_to(store / "owl" / "4.png")  # and a picture.
    (root / "cat" / "7.png").symlink_to(store / "gone.png")  # This is an error when it is read.
    assert list_classes(root) == {
        "cat": [f"cat/{name}.png" for name in ("1", "2", "6", "7", "again/5")],
        "dog": ["dog/3.png"],
        "owl": ["owl/4.png"],
    }
    assert len(list_pictures(root)) == 7
    (root / "dog" / "cat").symlink_to(root / "cat")
    with pytest.raises(UserError, match=r"dog/cat is the same folder as cat, .* of two classes"):
        list_classes(root)
    (root / "dog" / "cat").unlink()
    (root / "cow").symlink_to(store / "owl")
    with pytest.raises(UserError, match="owl is the same folder as cow"):
        list_classes(root)


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    plant(tmp_path, "n01/1.png", "n03/3.png")
    (tmp_path / "n02").symlink_to("/nowhere/n02")
    for list_ in (list_classes, list_pictures):
        with pytest.raises(
            UserError, match=r"the link .*n02 leads to /nowhere/n02, which does not exist"
        ):
            list_(tmp_path)
    (tmp_path / "n02").unlink()
    (tmp_path / "n02").symlink_to("n02")
    with pytest.raises(UserError, match=r"cannot read .*n02: Too many levels"):
        list_classes(tmp_path)
    (tmp_path / "n02").unlink()
    (tmp_path / "n02").mkdir()
    scandir = os.scandir

    def stale(path):  # Permissions would not stop root.
        if str(path).endswith("n02"):
            raise OSError(116, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(UserError, match=r"cannot read .*n02: Stale file handle"):
        FolderSource(tmp_path)


def test_classes_without_pictures_are_named(tmp_path):
    plant(tmp_path, "train/a/1.png", "train/b/", "train/c/2.png", "val/a/1.png", "val/b/", "val/c/")
    with pytest.raises(UserError, match="class folders without pictures: b; fill them"):
        FolderSource(tmp_path / "train")
    (tmp_path / "train" / "b" / "3.png").touch()
    data = ConfigDict(
        dict(source="folder", path=str(tmp_path), split="train", num_classes=3, image_channels=3)
    )
    assert sources.make_source(data).class_names == ("a", "b", "c")
    # A validation split may lack classes.
    assert sources.make_source(data, "val").class_names == ("a", "b", "c")


def test_numbers_are_sorted_as_numbers(tmp_path):
    plant(tmp_path, *(f"{i}/{i}.png" for i in range(12)))
    source = FolderSource(tmp_path)
    assert source.class_names == tuple(map(str, range(12)))
    assert [source.label(i) for i in range(12)] == list(range(12))
    assert source.name(2) == "2/2.png"
    plant(tmp_path, "x/x.png")  # With one name that is no number, all are sorted as text.
    assert FolderSource(tmp_path).class_names[:4] == ("0", "1", "10", "11")
    (tmp_path / "x" / "x.png").rename(tmp_path / "0" / "x.png")
    (tmp_path / "x").rmdir()
    plant(tmp_path, "007/1.png")
    with pytest.raises(
        UserError, match="the class folders 007 and 7 are the same number; rename one"
    ):
        FolderSource(tmp_path)
