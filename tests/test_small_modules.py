"""Storage, progress lines, pictures, filling, and the picture of the README."""

import errno
import math
import os
import pwd
import re
import sys
import threading
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from refusals import flipped, no_more_files, outcome
from safetensors.numpy import save_file

from tokenbridge_jax.pipeline.filling import fill_hidden
from tokenbridge_jax.runtime import pictures, progress, safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress, format_rate, format_seconds

# --- Storage --------------------------------------------------------------------------------------


def test_json_is_read_back_and_is_readable(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"ü": True}, "c": 0.1 + 0.2}
    path = tmp_path / "deep" / "er" / "x.json"
    storage.write_json(path, value)
    assert storage.read_json(path) == value
    assert path.read_text().count("\n") > 5
    assert path.read_text().endswith("}\n")


def test_writing_replaces_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "x"
    storage.write_bytes(path, b"old, and longer")
    storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * storage.NAME_BYTES)
    storage.write_bytes(path, b"here")
    assert os.listdir(tmp_path) == [path.name]


def test_homes_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert storage.expand("~/run") == "/home/me/run"
    assert storage.expand(Path("~/run")) == "/home/me/run"
    assert storage.expand("~root/x") == f"{pwd.getpwnam('root').pw_dir}/x"
    assert storage.user_cache() == Path("/home/me/.cache")
    for same in ("/a/~b", "a~/b", "gs://bucket/~a", "", "gs://bucket/" + "x" * 300):
        assert storage.expand(same) == same
    # A file whose name begins with ~.
    monkeypatch.chdir(tmp_path)
    assert storage.expand("./~run") == str(tmp_path / "~run")
    # A user without a home, as in a container.
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    with pytest.raises(UserError, match="HOME is not set; write the whole path"):
        storage.expand("~/run")
    assert storage.user_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.user_cache() == tmp_path


@pytest.mark.parametrize("content", [None, "[1]"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_changes_nothing(monkeypatch, tmp_path, content, code, message):
    path = tmp_path / "x.json"
    if content:
        path.write_text(content)

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        storage.write_json(path, [2])
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {"x.json": content} if content else {}
    )


def test_bytes_are_on_disk_before_the_name(monkeypatch, tmp_path):
    """After a crash between the two, no file has the name without its bytes."""
    path = tmp_path / "x"
    at_fsync = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: at_fsync.append((path.exists(), os.fstat(fd).st_size))
    )
    storage.write_bytes(path, b"12345")
    assert at_fsync == [(False, 5)]


def test_a_file_in_place_of_a_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x\.json"):
        storage.write_json(tmp_path / "file" / "x.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder"):
        storage.write_json(tmp_path / "folder", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_reader_sees_only_complete_files(tmp_path):
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


@pytest.mark.parametrize(
    ("save", "read", "message"),
    [
        (storage.write_npz, storage.read_npz, "cannot be read: "),
        (lambda path, x: np.savez_compressed(path, **x), storage.read_npz, "cannot be read: "),
        (safetensors_file.write, safetensors_file.read, "is damaged: "),
    ],
)
def test_a_flipped_bit_is_reported_or_harmless(tmp_path, save, read, message):
    path, rng = tmp_path / "x.npz", np.random.default_rng(0)
    saved = {"mu": rng.normal(size=20), "sigma": rng.integers(3, size=(20, 20))}
    save(path, saved)
    reported = 0
    for bit in rng.choice(8 * path.stat().st_size, 60, replace=False):
        with flipped(path, int(bit)):
            found, error = outcome(lambda: read(path))
        if error:
            assert error.startswith(f"{path} {message}")
            assert "\n" not in error
            reported += 1
        else:  # A bit in the list of a `.npz` file may change a name or a date.
            names = saved.keys() & found.keys() if read is storage.read_npz else saved.keys()
            for name in names:
                np.testing.assert_array_equal(found[name], saved[name], strict=True)
    assert reported > (40 if read is storage.read_npz else 48)


def test_safetensors_of_other_programs_are_read(tmp_path):
    types = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
    arrays = {f"of/{t}": np.arange(6).astype(t).reshape(2, 3) for t in types}
    arrays |= {"none": np.zeros((0, 3), np.float32), "one": np.array(2.5)}
    path = tmp_path / "x.safetensors"
    save_file(arrays, path)
    found = traverse_util.flatten_dict(safetensors_file.read(path), sep="/")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    for dtype, count in (("F8_E5M2", 4), ("BF16", 2)):
        header = f'{{"x": {{"dtype": "{dtype}", "shape": [{count}], "data_offsets": [0, 4]}}}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
        with pytest.raises(UserError, match="holds numbers of a type that numpy lacks, "):
            safetensors_file.read(path)


def test_reading_safetensors_copies_arrays_once(tmp_path):
    path, size = tmp_path / "x.safetensors", 2**24
    safetensors_file.write(path, {"x": np.arange(size // 4, dtype=np.float32)})
    tracemalloc.start()
    try:
        x = safetensors_file.read(path)["x"]
        assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(x, np.arange(size // 4, dtype=np.float32), strict=True)


def test_the_systems_reason_for_an_unreadable_file_is_reported(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros(3))
    for read in (storage.read_npz, storage.read_json, storage.sha256, safetensors_file.read):
        with pytest.raises(UserError) as caught, no_more_files():
            read(path)
        assert str(caught.value).startswith(f"cannot read {path}: Too many open files; ")
        with pytest.raises(UserError, match=r"y\.npz does not exist"):
            read(tmp_path / "y.npz")


# --- Progress lines -------------------------------------------------------------------------------


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


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "0.0 img/s"),
        (1.04, "1.0 img/s"),
        (0.06, "3.6 img/min"),
        (1 / 3000, "1.2 img/h"),
        (1 / 36_000, "0.1 img/h"),
    ],
)
def test_slow_work_has_its_rate_in_minutes_or_hours(rate: float, text: str):
    assert format_rate(rate, "img") == text


def test_a_line_has_the_progress_the_rate_and_the_time_left(clock, capsys):
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
    assert capsys.readouterr().err == ""  # The final line is already printed.


def test_the_rate_does_not_count_the_initial_work(clock, capsys):
    bar = Progress(100, "img", "train", done=40, scale=64, every_seconds=0.0)
    clock.now += 8
    bar.update(10)  # 10 steps of 64 images in 8 seconds; 50 steps are left.
    assert bar.rate == 80
    assert bar.elapsed == 8
    assert capsys.readouterr().err == "train 50/100 (50%)  80.0 img/s  eta 40s\n"


def test_without_finished_work_there_is_no_estimate(clock, capsys):
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


def test_a_line_may_be_invisible(clock, capsys):
    with Progress(2, visible=False, every_seconds=0.0) as bar:
        clock.now += 1
        bar.update()
    assert capsys.readouterr() == ("", "")
    with Progress(2, every_seconds=0.0):
        pass
    assert capsys.readouterr().err.count("\n") == 1


# --- Pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (2, 3)), (7, 2, (4, 2)), (3, 10, (1, 10))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_images_row_by_row(count, columns, shape, channels):
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
def test_a_png_file_holds_the_exact_pixels(tmp_path, channels: int, mode: str):
    image = np.random.default_rng(2).integers(256, size=(5, 9, channels)).astype(np.uint8)
    pictures.write_png(tmp_path / "new" / "x.png", image)
    with Image.open(tmp_path / "new" / "x.png") as read:
        assert (read.format, read.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)


# --- README ---------------------------------------------------------------------------------------


def test_the_picture_of_the_readme_exists():
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text()
    assert "@@" not in text
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert [(root / name).is_file() for name in shown] == [True] * max(1, len(shown))


# --- Filling --------------------------------------------------------------------------------------


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
