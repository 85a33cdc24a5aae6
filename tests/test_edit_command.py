"""`tokenbridge edit` with the smallest model: its files, and mistakes in one line."""

import numpy as np
import pytest
from PIL import Image

from tokenbridge_jax import Pipeline
from tokenbridge_jax.commands import edit, runner
from tokenbridge_jax.data.images import prepare

SAMPLING = dict(num_iter=2, guidance=1.5, temperature=0.8)
FLAGS = [f"--config.sampling.{name}={value}" for name, value in SAMPLING.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two colour pictures of one size, a wide one, and a file that is not a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (24, 20)), ("b.jpg", (24, 20)), ("wide/c.png", (40, 20))):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(*size[::-1], 3)).astype(np.uint8)).save(path)
    (folder / "notes.txt").write_text("a picture of a cat")
    return folder


@pytest.fixture
def run(pipeline, folder, tmp_path, monkeypatch):
    """Runs the command with a loaded pipeline; returns the status."""
    monkeypatch.setattr(Pipeline, "load", lambda workdir, **rest: pipeline)

    def run(*flags: str, source: str = "") -> int:
        argv = [f"--workdir={tmp_path}", f"--input={folder / source}", *FLAGS, *flags]
        return runner.run("edit", argv)

    return run


@pytest.fixture
def refused(run, capsys):
    """Runs the command, which must end with one line about a mistake."""

    def refused(message: str, *flags: str) -> None:
        assert run(*flags) == 2, flags
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1

    return refused


def _read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _square(path) -> np.ndarray:
    with Image.open(path) as image:
        return prepare(image, 8, 1)


def test_pictures_and_a_sheet_are_written(run, pipeline, folder, tmp_path, capsys):
    mask = np.zeros((20, 24), np.uint8)
    mask[:, :12] = 255  # After cropping 24x20 to the square in the middle: its left half.
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = "--num_images=3", "--classes=cat,none", "--seed=4", "--blend=0"
    assert run(f"--mask={tmp_path / 'mask.png'}", *flags) == 0
    images = np.stack([_square(folder / name) for name in ("a.png", "b.jpg")])
    half = np.tile(np.arange(8) < 4, (8, 1))
    expected = pipeline.edit(
        images.repeat(3, axis=0), half, ["cat", None, "cat"] * 2, seed=4, blend=0, **SAMPLING
    )
    names = [f"{stem}-{i}.png" for stem in "ab" for i in range(3)]
    found = np.stack([_read(tmp_path / "edits" / name) for name in names])
    np.testing.assert_array_equal(found, expected[..., 0])
    assert {path.name for path in (tmp_path / "edits").iterdir()} == {
        *names, "edits.png", "settings.json",
    }  # fmt: skip
    # Cells of 48 pixels, enlarged 6 times: original, mask and three edits in a row.
    sheet = _read(tmp_path / "edits" / "edits.png")
    assert sheet.shape == (98, 248)
    cells = [sheet[50::6][:8, 50 * column :: 6][:, :8] for column in range(5)]
    np.testing.assert_array_equal(cells[0], images[1, :, :, 0])
    np.testing.assert_array_equal(cells[1], 255 * half)
    np.testing.assert_array_equal(cells[2:], found[3:])
    assert "wrote 6 edits and edits.png to" in capsys.readouterr().out
    # The same part as a box; one picture, into another folder.
    out = tmp_path / "elsewhere"
    assert run("--box=0,0,0.5,1", *flags[1:], f"--output={out}", source="a.png") == 0
    np.testing.assert_array_equal(_read(out / "a-0.png"), found[0])


def test_pixels_in_a_box_affect_touch_ups_only(run, tmp_path):
    picture = np.random.default_rng(1).integers(256, size=(8, 8)).astype(np.uint8)
    edits = []
    for i, left in enumerate((picture[:, :4], 255 - picture[:, :4])):
        picture[:, :4] = left
        path = tmp_path / f"in{i}" / "x.png"
        path.parent.mkdir()
        Image.fromarray(picture).save(path)
        for flags in [], ["--encode_hidden"]:
            out = tmp_path / f"out{i}{len(flags)}"
            given = "--num_images=3", *flags, f"--input={path}", f"--output={out}"
            assert run("--box=0,0,0.5,1", *given) == 0
            edits.append([_read(out / f"x-{k}.png") for k in range(3)])
    hidden, touched_up, again, other = edits
    np.testing.assert_array_equal(again, hidden)
    assert (np.array(other) != touched_up).any()


def test_variations_and_margins(run, pipeline, folder, tmp_path):
    image = _square(folder / "wide" / "c.png")
    assert run("--keep=0.5", "--classes=cat:0.25,dog:0.75", source="wide/*") == 0
    expected = pipeline.edit(image, None, {"cat": 0.25, "dog": 0.75}, keep=0.5, **SAMPLING)
    np.testing.assert_array_equal(_read(tmp_path / "edits" / "c-0.png"), expected[..., 0])
    out = tmp_path / "wide"
    flags = "--outpaint=0.5,0,0.3,0.2", "--classes=7", f"--output={out}"
    assert run(*flags, source="wide") == 0
    expected = pipeline.outpaint(image, "7", left=4, right=2, bottom=2, **SAMPLING)
    np.testing.assert_array_equal(_read(out / "c-0.png"), expected[..., 0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name the part to redraw: --mask, --box, --keep or --outpaint"),
        (["--box=0,0,1,1", "--mask=m.png"], "--mask and --box both name the part to redraw"),
        (["--keep=0.5", "--outpaint=1,0,0,0"], "give either --keep or --outpaint"),
        (["--box=0,0,1"], "--box=0,0,1 must be four shares, 0 or more, such as 0.25,0.25,0.5,0.5"),
        (["--box=0,0,1,half"], "--box=0,0,1,half must be four shares"),
        (["--outpaint=-1,0,0,0"], "--outpaint=-1,0,0,0 must be four shares, 0 or more"),
        (["--outpaint=0,0,0,0.01"], "rounds to nothing: margins are multiples of 2 of 8 pixels"),
        (["--outpaint=1e9,0,0,0"], "8x8000000008 pixels with the margins are more than the 5368"),
        (["--box=0.5,0,0.6,1"], "--box=0.5,0.0,0.6,1.0 ends outside the picture"),
        (["--box=0,0,0,1"], "--box=0.0,0.0,0.0,1.0 is smaller than one of 8 pixels"),
        (["--box=0,0,1,1"], "covers all positions of image 0"),
        (["--keep=0.5", "--num_images=0"], "--num_images=0 must be at least 1"),
        (["--keep=0.5", "--classes=cat:1,dog"], "--classes=cat:1,dog is no mixture"),
        (["--keep=0.5", "--blend=-1"], "blend=-1 must be 0 or more pixels"),
        (["--keep=0.5", "--config.sampling.batch_size=0"], "batch_size=0 must be at least 1"),
        (["--box=0,0,1,0.5", '--classes="a, b",cat'], "there is no class named 'a, b' among 3"),
        (["--keep=0.5", "--input="], "--input is not set; name a picture"),
        (["--keep=0.5", "--input=nowhere"], "--input=nowhere does not exist"),
        (["--mask=nowhere.png"], "cannot read the picture nowhere.png ("),
    ],
)
def test_mistakes_are_reported_in_one_line(refused, tmp_path, flags, message):
    refused(message, *flags)
    assert not (tmp_path / "edits").exists()


def test_pictures_that_cannot_be_used_are_named(refused, tmp_path):
    Image.fromarray(np.zeros((20, 23), np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    Image.fromarray(np.zeros((20, 23), np.uint8)).save(tmp_path / "a.png")
    message = "is 23x20 pixels, a picture 24x20; make it as large, or 8x8"
    refused(message, f"--mask={tmp_path}/mask.png")
    refused("cannot read the picture", "--keep=0.5", f"--input={tmp_path}/a.jpg")
    refused("would have one name; rename one", "--keep=0.5", f"--input={tmp_path}")


def test_pictures_are_not_overwritten(refused, folder, tmp_path):
    """Output that cannot be written is reported before anything is drawn."""
    own = tmp_path / "own"
    own.mkdir()
    for name in ("a.png", "a-0.png", "edits.png", "m.png"):
        (own / name).write_bytes((folder / "a.png").read_bytes())
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "file").write_text("a file")
    (tmp_path / ("x" * 250 + ".png")).write_bytes(before["a.png"])
    keep, box, out = "--keep=0.5", "--box=0,0,0.5,1", f"--output={tmp_path}"
    for message, *flags in (
        ("is the folder of the pictures", keep, f"--input={own}", f"--output={own}"),
        ("folder of the pictures", keep, f"--input={own}", f"{out}/link/../own"),
        ("a-0.png would be overwritten", keep, f"--input={own}/a*.png", f"--output={own}"),
        ("would be overwritten", keep, f"--input={own}/edits.png", f"{out}/link"),
        ("overwritten", f"--mask={own}/a-0.png", f"--input={own}/a.png", f"--output={own}"),
        ("a.png is a file; name a folder", box, f"--input={own}/a.png", f"--output={own}/a.png"),
        ("256 bytes, a file's at most 255", box, f"--input={tmp_path}/x*", f"{out}/o"),
        ("file is a file; name a folder", box, f"{out}/file/o"),
    ):
        refused(message, *flags)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert not (tmp_path / "o").exists()


def test_edits_of_other_settings_are_not_replaced(run, refused, folder, tmp_path, capsys):
    """The rule of `sample`: the same command is welcome again, others are refused."""
    edits = tmp_path / "edits"
    flags = "--keep=0.5", f"--input={folder}/a.png"
    assert run(*flags) == 0
    before = {path.name: path.read_bytes() for path in edits.iterdir()}
    (edits / "a-0.png").unlink()
    assert run(*flags, "--config.sampling.batch_size=3") == 0
    capsys.readouterr()
    for change, difference in {
        "--seed=1": "seed = 0 but this run has 1",
        "--keep=0.25": "keep = 0.5 but this run has 0.25",
        "--classes=cat": 'classes = [null] but this run has ["cat"]',
        "--num_images=2": "num_images = 1 but this run has 2",
        "--config.sampling.num_iter=3": "sampling.num_iter = 2 but this run has 3",
        "--box=0,0,1,0.5": 'mask = "" but this run has',
        f"--input={folder}/b.jpg": 'pictures = ["a.png"] but this run has ["b.jpg"]',
    }.items():
        mend = "set it back, remove the folder, or name another --output"
        message = f"the images in {edits} have {difference}"
        refused(message if "mask" in difference else f"{message}; {mend}", *flags, change)
    assert {path.name: path.read_bytes() for path in edits.iterdir()} == before
    (edits / "settings.json").unlink()
    refused("holds files, but no settings.json with their settings; remove the folder", *flags)


def test_classes_and_mixtures_are_distinguished():
    assert edit.parse_classes([]) == [None]
    assert edit.parse_classes(["3", "none", "cat"]) == ["3", None, "cat"]
    assert edit.parse_classes(["3:0.5", "cat:0.5"]) == [{"3": 0.5, "cat": 0.5}]
