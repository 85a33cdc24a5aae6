"""`sample`: its files against `Pipeline.generate`, shards, second starts, kills and refusals."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from evaluated import save_tiny
from jobs import start_job, wait_until
from PIL import Image

from tokenbridge_jax import Pipeline
from tokenbridge_jax.commands import runner
from tokenbridge_jax.evaluation.image_sets import open_images
from tokenbridge_jax.runtime import meshes, pictures, storage

COUNT, CLASSES = 21, [2, 0, 1, 0]
SETTINGS = dict(num_iter=2, guidance=1.5, temperature=0.8)
FLAGS = [
    "--classes=7,cat,dog,0",
    "--seed=3",
    "--config.sampling.batch_size=8",
    *(f"--config.sampling.{name}={value}" for name, value in SETTINGS.items()),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "model"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(model):
    return Pipeline.load(model, mesh=meshes.make_mesh())


@pytest.fixture(autouse=True)
def one_pipeline(pipeline, monkeypatch):
    """All calls have one pipeline, so that programs are compiled once."""
    monkeypatch.setattr(Pipeline, "load", lambda workdir, **rest: pipeline)


@pytest.fixture(scope="module")
def labels():
    return list(itertools.islice(itertools.cycle(CLASSES), COUNT))


@pytest.fixture(scope="module")
def expected(pipeline, labels):
    """The images that every call must write."""
    return pipeline.generate(labels, seed=3, batch_size=8, **SETTINGS)


@pytest.fixture
def flags(model, tmp_path):
    """Of every call; flags after them replace them."""
    return [f"--workdir={model}", f"--output={tmp_path}", f"--num_images={COUNT}", *FLAGS]


@pytest.fixture
def sample(flags):
    return lambda *more: runner.run("sample", [*flags, *more])


@pytest.fixture
def refuses(flags, refused, capsys):
    """A call with further flags must end with one line that has this message."""

    def refuses(message: str, *more: str) -> None:
        capsys.readouterr()
        refused("sample", message, [*flags, *more])

    return refuses


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of the images that each call draws."""
    calls = []
    stream = Pipeline.stream

    def record(self, *arguments, numbers, **keywords):
        calls.append(list(numbers))
        return stream(self, *arguments, numbers=numbers, **keywords)

    monkeypatch.setattr(Pipeline, "stream", record)
    return calls


def read_pictures(folder, kind):
    """Grey values [N, H, W, 1] of a folder's pictures, by Pillow."""
    names = sorted(path.name for path in folder.glob(f"*.{kind}"))
    assert names == [f"{number:07d}.{kind}" for number in range(len(names))]
    images = []
    for name in names:
        with Image.open(folder / name) as picture:
            assert picture.format == kind.upper()
            images.append(np.asarray(picture.convert("L"))[..., None])
    return np.stack(images)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_more_steps_than_positions_are_not_made_and_a_line_says_so(sample, tmp_path, capsys):
    images = []
    for steps in (16, 20):  # The model has 16 positions.
        assert sample("--num_images=4", f"--config.sampling.num_iter={steps}") == 0
        images.append(storage.read_npz(tmp_path / "samples.npz")["arr_0"])
        line = (
            f"sampling.num_iter={steps} is more than the 16 positions: at most 16 steps are made\n"
        )
        assert capsys.readouterr().err.count(line) == (steps == 20)
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_shards_write_the_pictures_of_one_job(sample, drawn, expected, labels, tmp_path, kind):
    for shard in (2, 0, 1):
        assert sample(f"--format={kind}", f"--shard={shard}/3") == 0
    assert drawn == [[*range(14, 21)], [*range(7)], [*range(7, 14)]]
    np.testing.assert_array_equal(read_pictures(tmp_path / "images", kind), expected)
    assert np.load(tmp_path / "images" / "labels.npy").tolist() == labels
    shards = contents(tmp_path / "images")
    shutil.rmtree(tmp_path / "images")
    assert sample(f"--format={kind}") == 0
    assert contents(tmp_path / "images") == shards


def test_shards_write_npz_files_that_together_are_the_one(
    sample, drawn, expected, labels, tmp_path, capsys
):
    assert sample() == 0
    for shard in (1, 0, 3, 2):
        assert sample(f"--shard={shard}/4") == 0
    with np.load(tmp_path / "samples.npz") as whole:
        np.testing.assert_array_equal(whole["arr_0"], expected)
        assert whole["labels"].tolist() == labels
    folder = tmp_path / "shards"
    names = [f"samples-{number:05d}-of-00004.npz" for number in range(4)]
    assert sorted(contents(folder)) == [*names, "settings.json"]
    parts = [dict(np.load(folder / name)) for name in names]
    assert [len(part["labels"]) for part in parts] == [5, 5, 5, 6]
    assert np.concatenate([part["labels"] for part in parts]).tolist() == labels
    np.testing.assert_array_equal(np.concatenate([part["arr_0"] for part in parts]), expected)
    # `evaluate` reads both as the same set.
    sets = [open_images(path) for path in (tmp_path / "samples.npz", folder)]
    np.testing.assert_array_equal(*(next(images.batches(COUNT, 0, COUNT)) for images in sets))
    # Only what is missing is drawn again.
    (folder / names[2]).unlink()
    drawn.clear()
    capsys.readouterr()
    for shard in range(4):
        assert sample(f"--shard={shard}/4") == 0
    assert drawn == [[10, 11, 12, 13, 14]]
    assert f"{names[0]} is there already: nothing to do" in capsys.readouterr().err


def test_a_second_start_draws_what_is_missing(sample, drawn, expected, tmp_path, capsys):
    assert sample("--format=png") == 0
    first, grid = contents(tmp_path / "images"), (tmp_path / "grid.png").read_bytes()
    for number in (0, 5, 6, 20):
        (tmp_path / "images" / f"{number:07d}.png").unlink()
    (tmp_path / "grid.png").unlink()
    capsys.readouterr()
    assert sample("--format=png") == 0
    assert "holds 17 of 21 images: drawing the others" in capsys.readouterr().err
    assert drawn[1:] == [[0, 5, 6, 20]]
    assert contents(tmp_path / "images") == first
    assert (tmp_path / "grid.png").read_bytes() == grid
    assert sample("--format=png", "--num_images=23") == 0
    assert drawn[2:] == [[21, 22]]
    assert contents(tmp_path / "images").items() > first.items() - {
        ("labels.npy", first["labels.npy"])
    }
    # Fewer images: nothing is drawn, and every picture keeps its label.
    capsys.readouterr()
    assert sample("--format=png", "--num_images=4") == 0
    assert drawn[3:] == [[]]
    printed = capsys.readouterr()
    folder = tmp_path / "images"
    assert printed.err == f"{folder} holds 23 images, 4 are asked for: nothing to draw\n"
    assert printed.out == f"wrote {tmp_path / 'grid.png'}\n"
    assert sample("--format=png", "--shard=1/3") == 0
    printed = capsys.readouterr()
    assert printed.err == f"{folder} holds 23 images, 7 are asked for: nothing to draw\n"
    assert not printed.out
    held = np.load(tmp_path / "images" / "labels.npy").tolist()
    assert held == list(itertools.islice(itertools.cycle(CLASSES), 23))
    np.testing.assert_array_equal(read_pictures(tmp_path / "images", "png")[:COUNT], expected)


def test_programs_are_compiled_early_if_there_is_surely_work(
    sample, refuses, pipeline, monkeypatch
):
    asked = []

    def load(workdir, *, ahead, **rest):
        asked.append(ahead)
        return pipeline

    monkeypatch.setattr(Pipeline, "load", load)
    refuses("nosuch", "--classes=nosuch")
    assert not asked
    for _ in range(2):  # The folder holds all images before the second call.
        assert sample("--format=png") == 0
    first = {"count": COUNT, "batch_size": 8, **SETTINGS}
    assert first.items() <= asked[0].items()
    assert asked[1] is None


def test_what_is_not_of_this_command_stays_and_leftovers_of_killed_runs_go(
    sample, refuses, tmp_path, drawn, capsys
):
    folder = tmp_path / "images"
    assert sample("--format=png") == 0
    old, young = folder / ".a.tmp", folder / ".b.tmp"
    for path in (old, young, folder / "3.png", folder / "notes.png"):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    (folder / f"{3:07d}.png").unlink()
    assert sample("--format=png") == 0
    assert drawn[1:] == [[3]]
    assert {path.name for path in folder.iterdir()} >= {".b.tmp", "3.png", "notes.png"}
    assert not old.exists()

    Image.new("L", (4, 4)).save(folder / f"{3:07d}.png")
    assert sample("--format=png") == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "holds 21 images, 21 are asked for: nothing to draw" in error
    assert "0000003.png is not 8x8 pixels; remove it and run again" in error
    (folder / "settings.json").write_text("[]")
    refuses("settings.json does not hold settings; remove the folder", "--format=png")
    shutil.rmtree(folder)
    folder.write_text("a file")
    refuses("images", "--format=png")


def test_a_killed_run_continues(sample, flags, expected, tmp_path):
    """SIGKILL while pictures are written; complete pictures alone have their names."""
    program = (
        "import sys, time\n"
        "from tokenbridge_jax.commands import runner\n"
        "from tokenbridge_jax.runtime import storage\n"
        "replacing = storage.replacing\n"
        "def slow(path):\n"
        "    time.sleep(0.2)\n"
        "    return replacing(path)\n"
        "storage.replacing = slow\n"
        "runner.run('sample', sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, *flags, "--format=png"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        folder = tmp_path / "images"
        wait_until(lambda: len(list(folder.glob("*.png"))) > 2 or process.poll() is not None)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = {name: content for name, content in contents(folder).items() if name.endswith(".png")}
    assert 2 < len(kept) < COUNT
    assert sample("--format=png") == 0
    assert contents(folder).items() >= kept.items()
    np.testing.assert_array_equal(read_pictures(folder, "png"), expected)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_full_disk_gives_one_line_and_leaves_nothing_incomplete(
    sample, expected, tmp_path, monkeypatch, capsys, kind
):
    fsync, left = storage.os.fsync, 6 if kind == "png" else 0

    def fail(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fail)
        assert sample(f"--format={kind}") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenbridge sample: error: cannot write")
    assert "the disk is full; free some space and run again" in line
    assert not list(tmp_path.rglob(".*"))
    assert not (tmp_path / "samples.npz").exists()
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected[int(path.stem), ..., 0])
    assert sample(f"--format={kind}") == 0


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_few_batches_are_alive(sample, monkeypatch, kind):
    """Writing is slower than drawing here, and drawing waits for it."""
    stream, alive, most = Pipeline.stream, [], []

    def record(self, *arguments, **keywords):
        for images in stream(self, *arguments, **keywords):
            copy = images.copy()  # Every view of an image keeps it.
            alive.append(weakref.ref(copy))
            del images
            most.append(sum(batch() is not None for batch in alive))
            yield copy
            del copy

    def slow(path, image, kind, write=pictures.write):
        time.sleep(0.01)
        write(path, image, kind)

    monkeypatch.setattr(Pipeline, "stream", record)
    monkeypatch.setattr(pictures, "write", slow)
    assert sample(f"--format={kind}", "--num_images=160") == 0
    assert len(alive) == 20
    # One is being written, one has just been drawn, and one may be in a variable.
    assert max(most) <= 3


def test_pictures_of_other_settings_are_refused(sample, refuses, tmp_path):
    assert sample("--format=png") == 0
    folder = tmp_path / "images"
    before = contents(folder)
    for flag, difference in [
        ("--seed=4", "seed = 3 but this run has 4"),
        ("--classes=0", "classes = [2, 0, 1, 0] but this run has [0]"),
        ("--config.sampling.num_iter=3", "sampling.num_iter = 2 but this run has 3"),
        ("--format=webp", 'format = "png" but this run has "webp"'),
    ]:
        mend = "set it back, remove the folder, or name another --output"
        message = f"the images in {folder} have {difference}; {mend}"
        refuses(message, "--format=png", flag)
    assert contents(folder) == before
    # The batch size does not determine the images.
    assert sample("--format=png", "--config.sampling.batch_size=16") == 0
    other = json.loads(before["settings.json"]) | {"weights_sha256": "0" * 64}
    (folder / "settings.json").write_text(json.dumps(other))
    refuses("have weights_sha256 = 000000000000 but this run has", "--format=png")
    (folder / "settings.json").unlink()
    refuses("holds files, but no settings.json with their settings; remove", "--format=png")


# Two processes claim empty folders at the same moment, each for its own seed. Prints the seeds that
# were refused.
CLAIMS = """
import os, pathlib, sys, time
from tokenbridge_jax.evaluation import generation
from tokenbridge_jax.runtime.errors import UserError
root, start = pathlib.Path(sys.argv[1]), time.time() + 0.5
child = os.fork()
for number in range(150):
    while time.time() < start + number / 200:
        pass
    try:
        generation._claim(root / str(number), {"seed": child > 0})
    except UserError:
        (root / f"{number}-{child > 0}-refused").touch()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
os._exit(0)
"""


def test_of_two_jobs_that_claim_a_folder_at_once_one_is_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", CLAIMS, tmp_path], env=environment, check=True)
    for number in range(150):
        has = json.loads((tmp_path / str(number) / "settings.json").read_text())["seed"]
        assert [path.name for path in tmp_path.glob(f"{number}-*")] == [
            f"{number}-{not has}-refused"
        ]
        assert len(list((tmp_path / str(number)).iterdir())) == 1


def test_npz_shards_of_another_division_are_refused(sample, refuses):
    assert sample("--shard=0/3") == 0
    refuses("num_images = 21 but this run has 22", "--num_images=22", "--shard=1/3")
    refuses("shards = 3 but this run has 4", "--shard=1/4")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--shard=3/3", "--shard=3/3 must be I/N with I from 0 to N - 1, such as 0/4"),
        ("--shard=1", "--shard=1 must be I/N"),
        ("--shard=-1/2", "--shard=-1/2 must be I/N"),
        ("--shard=0/0", "--shard=0/0 must be I/N"),
        ("--shard=0/22", "--shard=0/22 must have at most --num_images=21 parts"),
    ],
)
def test_shards_that_do_not_exist_are_refused(refuses, tmp_path, flag, message):
    refuses(message, flag)
    assert not list(tmp_path.iterdir())


def test_the_processes_of_a_job_complete_a_folder(sample, flags, tmp_path):
    """Of two processes, each writes every second image that is missing."""
    assert sample("--format=png") == 0
    folder = tmp_path / "images"
    alone = read_pictures(folder, "png")
    for number in (1, 2, 3, 9, 20):
        (folder / f"{number:07d}.png").unlink()
    command = ["-m", "tokenbridge_jax.commands.sample", *flags, "--format=png"]
    job = start_job([*command, "--distributed"], [[], []], devices=1)
    outputs = [process.communicate(timeout=120)[0] for process in job]
    assert [process.returncode for process in job] == [0, 0], outputs
    assert f"wrote {folder} (5 images)" in outputs[0]
    np.testing.assert_array_equal(read_pictures(folder, "png"), alone)
