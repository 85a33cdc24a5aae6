"""io, progress, pictures and filling."""

import errno
import math
import os
import pwd
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import flipped, no_more_files, outcome

from tokenbridge_jax.pipeline.filling import fill_hidden
from tokenbridge_jax.runtime import pictures, progress, safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress, format_seconds

# --- io -------------------------------------------------------------------------------------------


def test_json_comes_back_and_is_for_people_too(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"ü": True}, "c": 0.1 + 0.2}
    path = tmp_path / "deep" / "er" / "x.json"
    storage.write_json(path, value)
    assert storage.read_json(path) == value
    assert path.read_text().count("\n") > 5
    assert path.read_text().endswith("}\n")


def test_writing_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "x"
    storage.write_bytes(path, b"old, and longer")
    storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_name_may_be_as_long_as_the_file_system_has_it(tmp_path):
    path = tmp_path / ("x" * storage.NAME_BYTES)
    storage.write_bytes(path, b"here")
    assert os.listdir(tmp_path) == [path.name]


def test_homes_are_where_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert storage.expand("~/run") == "/home/me/run"
    assert storage.expand(Path("~/run")) == "/home/me/run"
    assert storage.expand("~root/x") == f"{pwd.getpwnam('root').pw_dir}/x"
    assert storage.user_cache() == Path("/home/me/.cache")
    for same in ("/a/~b", "a~/b", "gs://bucket/~a", "", "gs://bucket/" + "x" * 300):
        assert storage.expand(same) == same
    # What is called so all the same, stays itself, also as a path.
    monkeypatch.chdir(tmp_path)
    assert storage.expand("./~run") == str(tmp_path / "~run")
    # A user that nobody knows, in a container say.
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    with pytest.raises(UserError, match="HOME is not set; write the whole path"):
        storage.expand("~/run")
    assert storage.user_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.user_cache() == tmp_path


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_changes_nothing_and_says_why(monkeypatch, tmp_path, existed, code, message):
    path = tmp_path / "x.json"
    if existed:
        path.write_text("[1]")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=message) as raised:
        storage.write_json(path, [2])
    assert str(path) in str(raised.value)
    assert os.listdir(tmp_path) == (["x.json"] if existed else [])
    if existed:
        assert storage.read_json(path) == [1]


def test_bytes_are_on_disk_before_the_name_is(monkeypatch, tmp_path):
    """A crash in between must not leave the name on a file whose bytes were never written."""
    path = tmp_path / "x"
    at_fsync = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: at_fsync.append((path.exists(), os.fstat(fd).st_size))
    )
    storage.write_bytes(path, b"12345")
    assert at_fsync == [(False, 5)]


def test_a_file_where_a_folder_should_be_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x\.json"):
        storage.write_json(tmp_path / "file" / "x.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder"):
        storage.write_json(tmp_path / "folder", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_reader_beside_a_writer_sees_whole_files_only(tmp_path):
    path = tmp_path / "x.json"
    storage.write_json(path, [0] * 1000)
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            storage.write_json(path, [number] * (1000 + number % 100))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert len(set(storage.read_json(path))) == 1
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", '{"a": 1'])
def test_json_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        storage.read_json(path)
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not valid JSON") as raised:
        storage.read_json(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_of_an_npz_is_told_or_does_no_harm(tmp_path, save):
    path, rng = tmp_path / "x.npz", np.random.default_rng(0)
    saved = {"mu": rng.normal(size=20), "sigma": rng.integers(3, size=(20, 20))}
    save(path, **saved)
    told = 0
    for bit in rng.choice(8 * path.stat().st_size, 60, replace=False):
        with flipped(path, int(bit)):
            found, message = outcome(lambda: storage.read_npz(path))
        if message:
            assert re.fullmatch(rf"{path} cannot be read: .*", message)
            told += 1
        else:  # In the archive's list, where a name may now be another, or a date.
            for name in found.keys() & saved.keys():
                assert np.array_equal(found[name], saved[name])
    assert told > 40


def test_a_flipped_bit_of_safetensors_is_told_or_does_no_harm(tmp_path):
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    saved = {"layer": {"kernel": rng.normal(size=(8, 9)), "bias": np.arange(3, dtype=np.float32)}}
    safetensors_file.write(path, saved)
    told = 0
    for bit in rng.choice(8 * path.stat().st_size, 60, replace=False):
        with flipped(path, int(bit)):
            found, message = outcome(lambda: safetensors_file.read(path)["layer"])
        if message:
            assert re.fullmatch(rf"{path} is damaged: .*", message)
            told += 1
        else:
            for name, array in saved["layer"].items():
                np.testing.assert_array_equal(found[name], array, strict=True)
    assert told > 48


def test_what_the_system_refuses_is_told_with_its_reason(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros(3))
    for read in (storage.read_npz, storage.read_json, storage.sha256, safetensors_file.read):
        with pytest.raises(UserError) as caught, no_more_files():
            read(path)
        assert str(caught.value).startswith(f"cannot read {path}: Too many open files; ")
        with pytest.raises(UserError, match=r"y\.npz does not exist"):
            read(tmp_path / "y.npz")


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (42.4, "42s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"),
        (3599, "59m59s"), (3599.7, "1h00m"), (7620, "2h07m"), (86399, "23h59m"),
        (86400, "1d00h"), (4 * 86400 + 3 * 3600 + 59, "4d03h"), (400 * 86400, "400d00h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str):
    assert format_seconds(float(seconds)) == text


class Clock:
    """A clock that stands until told otherwise."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_says_how_far_how_fast_and_when_it_ends(clock, capsys):
    bar = Progress(1000, "img", "tokenize", every_seconds=5.0)
    clock.now += 4
    bar.update(100)
    assert capsys.readouterr() == ("", "")  # Too early.
    clock.now += 6
    bar.update(150, loss=1.23456789, file="a.png")
    line = "tokenize 250/1000 (25%)  25.0 img/s  eta 30s  loss 1.235  file a.png\n"
    assert capsys.readouterr() == ("", line)
    clock.now += 30
    bar.update(750, file="b.png")
    line = "tokenize 1000/1000 (100%)  25.0 img/s  took 40s  loss 1.235  file b.png\n"
    assert capsys.readouterr().err == line
    bar.close()
    assert capsys.readouterr().err == ""  # It stands there already.


def test_the_rate_does_not_count_what_was_there_at_the_start(clock, capsys):
    bar = Progress(100, "img", "train", done=40, scale=64, every_seconds=0.0)
    clock.now += 8
    bar.update(10)  # 10 steps of 64 images in 8 seconds; 50 steps are left.
    assert bar.rate == 80
    assert bar.elapsed == 8
    assert capsys.readouterr().err == "train 50/100 (50%)  80.0 img/s  eta 40s\n"


def test_before_anything_is_done_there_is_no_estimate(clock, capsys):
    bar = Progress(100, every_seconds=0.0)
    clock.now += 1
    bar.update(0)
    assert "0/100 (0%)  0.0 img/s  eta ?" in capsys.readouterr().err
    Progress(0).close()
    assert "0/0  0.0 img/s  took 0s" in capsys.readouterr().err


def test_on_a_terminal_the_line_is_rewritten_in_place(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(2, desc="x") as bar:
        for _ in range(2):
            clock.now += 1
            bar.update()
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r\033[K") == 2


def test_a_note_gets_a_line_of_its_own(clock, monkeypatch, capsys):
    Progress(2).note("a.png is broken")
    assert capsys.readouterr().err == "a.png is broken\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Progress(2).note("a.png is broken")
    assert capsys.readouterr().err == "\r\033[Ka.png is broken\n"


def test_only_one_process_need_speak(clock, capsys):
    with Progress(2, visible=False, every_seconds=0.0) as bar:
        clock.now += 1
        bar.update()
    assert capsys.readouterr() == ("", "")
    with Progress(2, every_seconds=0.0):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (2, 3)), (7, 2, (4, 2)), (3, 10, (1, 10))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_lays_images_out_row_by_row(count, columns, shape, channels):
    size = pictures.SMALLEST_SIDE
    images = np.random.default_rng(0).integers(256, size=(count, size, size, channels))
    images = images.astype(np.uint8)
    grid = pictures.grid(images, columns)
    step = size + pictures.GAP
    rows, across = shape
    assert grid.shape == (rows * step - pictures.GAP, across * step - pictures.GAP, channels)
    assert grid.dtype == np.uint8
    seen = np.zeros(grid.shape[:2], bool)
    for i, image in enumerate(images):
        at = np.s_[i // across * step :, i % across * step :]
        np.testing.assert_array_equal(grid[at][:size, :size], image)
        seen[at][:size, :size] = True
    assert (grid[~seen] == pictures.GAP_VALUE).all()


@pytest.mark.parametrize(("side", "factor"), [(8, 6), (16, 3), (47, 2), (48, 1), (256, 1)])
def test_small_images_are_enlarged_by_a_whole_factor(side: int, factor: int):
    image = np.random.default_rng(1).integers(256, size=(1, side, side, 1)).astype(np.uint8)
    expected = np.kron(image[0, :, :, 0], np.ones((factor, factor), np.uint8))
    np.testing.assert_array_equal(pictures.grid(image)[:, :, 0], expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_exact_pixels(tmp_path, channels: int, mode: str):
    image = np.random.default_rng(2).integers(256, size=(5, 9, channels)).astype(np.uint8)
    pictures.write_png(tmp_path / "new" / "x.png", image)
    with Image.open(tmp_path / "new" / "x.png") as read:
        assert (read.format, read.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)


# --- README ---------------------------------------------------------------------------------------


def test_the_readme_shows_a_picture_that_is_there():
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text()
    assert "@@" not in text
    pictures_shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures_shown
    assert all((root / name).is_file() for name in pictures_shown)


# --- filling --------------------------------------------------------------------------------------


def test_hidden_pixels_fade_from_the_nearest_visible_one_to_the_mean():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3, 5, 7, 2)).astype(np.uint8)
    hidden = rng.random((3, 5, 7)) < np.array([0.9, 0.4, 0])[:, None, None]
    before = images.copy()
    filled = fill_hidden(images, hidden, 3)
    np.testing.assert_array_equal(images, before)
    assert filled.dtype == np.uint8
    np.testing.assert_array_equal(filled[~hidden], images[~hidden])
    for image, y, x in np.argwhere(hidden):
        visible = np.argwhere(~hidden[image])
        distances = np.sqrt(((visible - [y, x]) ** 2).sum(axis=1))
        nearest = images[image][tuple(visible[distances == distances.min()].T)]
        share = math.exp(-distances.min() / 3)
        mean = images[image][~hidden[image]].mean(axis=0)
        expected = np.round(share * nearest + (1 - share) * mean)
        assert (filled[image, y, x] == expected).all(axis=1).any()
    assert (fill_hidden(images, hidden | True, 3) == 128).all()
