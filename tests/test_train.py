"""`train`: from shards to checkpoints, pictures and numbers; exact resume; refusals."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tiny_model import TINY
from token_shards import (
    TRAINING,
    make_info,
    results,
    stopped_at_the_third_batch,
    write_tokens,
    write_workdir,
)

from tokenbridge_jax.autoencoder import init_params, save_autoencoder
from tokenbridge_jax.commands import runner, train
from tokenbridge_jax.data import shards
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.pipeline.description import ModelDescription
from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.compiled import Trial
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.training import auto, checkpoints
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED

STEPS = 6
FLAGS = TRAINING | {
    "training.accumulation": 2,
    "training.steps": STEPS,
    "training.checkpoint_every": 4,
    "training.eval_every": 3,
    "training.sample_every": STEPS,
    "mesh.tensor": 2,
}


def run(workdir, **changes):
    values = FLAGS | {name.replace("__", "."): value for name, value in changes.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return runner.run("train", ["--workdir", str(workdir), *flags])


@pytest.fixture(scope="module")
def straight(programs, tmp_path_factory):
    """A workdir trained without a stop, on a 2 x 2 x 2 mesh."""
    workdir = tmp_path_factory.mktemp("straight")
    write_workdir(workdir)
    assert run(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def resumed(programs, tmp_path_factory):
    """The same run, stopped once and started again; its first exit status and the step then."""
    workdir = tmp_path_factory.mktemp("resumed")
    write_workdir(workdir)
    with stopped_at_the_third_batch(train, "make_loader"):
        status = run(workdir, training__sample_every=0)
    stopped_at = checkpoints.latest_step(workdir / "checkpoints")
    assert run(workdir, training__sample_every=0) == 0
    return workdir, status, stopped_at


def ema_params(workdir):
    """The EMA parameters in the last checkpoint."""
    config = ModelDescription.load(workdir).config
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    abstract = abstract_params(config, mesh)
    return checkpoints.load_params(workdir / "checkpoints", abstract)


def test_a_stopped_run_continues_bit_for_bit(straight, resumed):
    workdir, status, stopped_at = resumed
    assert status == EXIT_INTERRUPTED == 75
    assert stopped_at == 3
    assert results(workdir) == results(straight)
    jax.tree.map(np.testing.assert_array_equal, ema_params(workdir), ema_params(straight))


def test_the_files_of_a_run(straight):
    lines = results(straight)
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert [row["step"] for row in lines if "val_nll_bits_per_index" in row] == [3, 6]
    # Random indices of 16 levels cannot be predicted with fewer than 4 bits.
    assert 3.9 < lines[-1]["val_nll_bits_per_index"] < 7
    assert lines[-1]["loss"] > 0.9 * np.log(16)
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["4", "6"]
    description = ModelDescription.load(straight)
    assert description.class_names == ("cat", "dog", "owl")
    assert description.config.channel_order == (2, 0, 1)
    assert description.config.positions == 16
    assert any((straight / "tensorboard").iterdir())
    assert storage.read_json(straight / "config.json")["training"]["steps"] == STEPS
    # 40 images of 16x16 pixels, enlarged threefold, ten in a row, with gaps of 2.
    with Image.open(straight / "samples" / f"step_{STEPS:07d}.png") as picture:
        assert picture.size == (10 * 50 - 2, 4 * 50 - 2)


def test_the_parameters_of_a_run_are_listed(straight):
    listed = (straight / "parameters.txt").read_text().splitlines()
    sizes = [leaf.size for leaf in jax.tree.leaves(ema_params(straight))]
    rows = [line.split("|") for line in listed if line.startswith("| ")]
    assert [row[1].strip() for row in rows[:1]] == ["Name"]
    assert sorted(int(row[4].replace(",", "")) for row in rows[1:]) == sorted(sizes)
    assert listed[-1].startswith(f"Total: {sum(sizes):,} ")


def test_a_finished_run_does_nothing(straight, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert run(straight) == 0
    assert "all 6 steps are done" in capsys.readouterr().err
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__batch_size": 32}, "training.batch_size was 16, is 32"),
        ({"model__head_width": 32}, "model.head_width was 16, is 32"),
        ({"seed": 5}, "seed was 0, is 5"),
    ],
)
def test_another_run_is_refused_and_changes_nothing(straight, capsys, changes, message):
    files = [straight / "model.json", straight / "config.json", straight / "metrics.jsonl"]
    before = [file.read_bytes() for file in files]
    assert run(straight, **changes) == runner.EXIT_USER_ERROR
    assert message in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer__levels": 32}, "the token shards have quantizer.level"),
        ({"quantizer__range": 4.0}, "the token shards have quantizer.m"),
        ({"quantizer__channel_order": "identity"}, "channel_order_rule"),
        ({"data__image_size": 32}, "image_size = 16 but this run has 32"),
        ({"data__num_classes": 2}, "3 classes but config.data.num_classes is 2"),
        ({"model__encoder_heads": 3}, "encoder_heads=3"),
        ({"training__batch_size": 20}, "make it a multiple of 8"),
        ({"training__batch_size": 0}, "training.batch_size is 0"),
        ({"training__head_fraction": 0.0}, "training.head_fraction is 0.0"),
        ({"training__class_dropout": 1.0}, "training.class_dropout is 1.0"),
        ({"training__batch_size": 64}, "a batch of 64 needs as many images"),
        ({"training__mask_min": 1.5}, "mask_min is 1.5"),
    ],
)
def test_settings_that_do_not_fit_are_named(straight, tmp_path, capsys, changes, message):
    for name in ("tokens", "autoencoder"):
        (tmp_path / name).symlink_to(straight / name)
    assert run(tmp_path, **changes) == runner.EXIT_USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {"autoencoder", "tokens"}


def test_shards_of_another_autoencoder_are_refused(straight, tmp_path, capsys):
    (tmp_path / "tokens").symlink_to(straight / "tokens")
    config = make_info().autoencoder
    save_autoencoder(tmp_path / "autoencoder", config, init_params(config, jax.random.key(1)))
    assert run(tmp_path) == runner.EXIT_USER_ERROR
    assert "autoencoder_hash" in capsys.readouterr().err


def test_hooks_that_are_not_possible_are_reported(tmp_path):
    (tmp_path / "tokens").mkdir()
    write_tokens(tmp_path / "tokens", {"train": [20, 13]})
    info = shards.read_info(tmp_path / "tokens")

    def left_out(every):
        training = {"eval_every": every, "sample_every": every}
        config = ConfigDict({"training": training, "evaluation": {"every": every}})
        return list(train._left_out(config, epath.Path(tmp_path), info))

    validation, scores, samples = left_out(1)
    assert "has no validation split" in validation
    assert "autoencoder does not exist: no scores" in scores
    assert "autoencoder does not exist: no sample grids" in samples
    assert left_out(0) == []


def test_the_classes_of_a_model_and_of_shards_are_compared(tmp_path):
    """Training that continues from an import, whose classes are numbers, and from its own model."""
    workdir = epath.Path(tmp_path)
    config = ConfigDict({"data": {"num_classes": 3}})

    def agreed(before, now, num_classes=3):
        config.data.num_classes = num_classes
        ModelDescription(TINY, before, "").save(workdir)
        return train.agree_on_classes(config, workdir, make_info(class_names=now))

    names, numbers = ("cat", "dog", "owl"), ("0", "1", "2")
    assert agreed(("x", "y", "z"), names) == (names, [])  # There is no checkpoint.
    for part in ("params", "ema_params", "opt_state", "run"):
        (tmp_path / "checkpoints" / "0" / part).mkdir(parents=True)
    assert agreed(names, names) == (names, [])
    kept, (note,) = agreed(numbers, names)
    assert kept == names
    assert "the classes of the model are numbers: they are taken for cat, dog, owl" in note
    assert agreed(names, numbers)[0] == names
    for before, now in ((numbers, ("0", "2", "1")), (names, ("dog", "cat", "owl"))):
        with pytest.raises(UserError, match=r"in another order: label [01] is"):
            agreed(before, now)
    other = ("a", "b", "c", "d")
    assert agreed(names, other, 4) == (other, ["4 classes instead of 3: a new class table"])


def test_classes_without_images_are_reported(programs, tmp_path, capsys):
    write_workdir(tmp_path)
    with stopped_at_the_third_batch(train, "make_loader"):
        assert run(tmp_path, data__num_classes=5) == EXIT_INTERRUPTED
    line = "the shards have 3 classes and data.num_classes is 5: the last ones are not trained"
    assert line in capsys.readouterr().err


def test_missing_folders_are_named(tmp_path, capsys):
    assert run(tmp_path / "nowhere") == runner.EXIT_USER_ERROR
    assert "nowhere does not exist" in capsys.readouterr().err
    assert run(tmp_path) == runner.EXIT_USER_ERROR
    assert "holds no token shards" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_auto_tries_the_compiler_and_a_resumed_run_remembers(
    programs, tmp_path, monkeypatch, capsys
):
    """Devices of little memory, and a compiler that refuses the first settings."""
    write_workdir(tmp_path)
    memory, tried = [12 * 2**30 // 10], []

    def at_hand(slices):
        return Devices("small", "gpu", jax.device_count(), slices, memory[0])

    def try_to_compile(compile_it):
        trial = real(compile_it)
        assert trial.compiled
        assert 0 < trial.bytes < 2**28
        tried.append(trial)
        return Trial(False, None) if len(tried) < 2 else trial

    real = train.try_to_compile
    monkeypatch.setattr(train.Devices, "at_hand", at_hand)
    monkeypatch.setattr(train, "try_to_compile", try_to_compile)
    free = {"training__accumulation": "auto", "mesh__data": -1, "mesh__fsdp": "auto"}
    free |= {"mesh__tensor": 1, "training__sample_every": 0}
    with stopped_at_the_third_batch(train, "make_loader"):
        assert run(tmp_path, **free) == EXIT_INTERRUPTED
    assert len(tried) == 2
    (entry,) = storage.read_json(tmp_path / auto.FILE).values()
    said = capsys.readouterr().err
    assert said.count("does not fit") == 1
    assert said.count("picked") == 1
    assert storage.read_json(tmp_path / "config.json")["mesh"]["fsdp"] == "auto"
    description = ModelDescription.load(tmp_path).config
    assert description.remat == entry["picked"]["remat"]
    # The compiler is not asked again, even where less memory is free.
    memory[0] = 2**30
    assert run(tmp_path, **free) == 0
    assert len(tried) == 2
    assert f"continues from step 3 of {STEPS}" in capsys.readouterr().err


def test_devices_without_memory_end_with_the_settings(tmp_path, monkeypatch, capsys):
    def fit(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    write_workdir(tmp_path)
    monkeypatch.setattr(train, "fit", fit)
    assert run(tmp_path) == runner.EXIT_USER_ERROR
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "error:" in x)
    assert "out of memory with fsdp " in line
    assert "--config.training.accumulation" in line
    assert auto.FILE not in line
