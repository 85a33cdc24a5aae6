"""A command's arguments: configs by name, file or workdir, files of flags, error messages."""

import importlib.util
import json

import pytest

from tokenbridge_jax.config import experiment
from tokenbridge_jax.runtime import storage

pytest_plugins = ["probe"]


def test_a_command_gets_its_flags_config_and_workdir(probe, run, config_file, tmp_path):
    overrides = "--config.training.steps=7", "--config.sizes=(8,)", "--config.training.fast=true"
    status, _, err = run(f"--config={config_file}", "--count=3", *overrides)
    assert (status, err) == (0, "")
    assert probe.args.count == 3
    assert probe.args.workdir == str(tmp_path / "work")
    assert not probe.args.distributed
    config = probe.args.config
    assert (config.training.steps, config.sizes, config.training.fast) == (7, (8,), True)
    assert config.training.rate == 0.5
    with pytest.raises(AttributeError, match="steeps"):  # Locked, so a typo in code raises too.
        config.training.steeps = 1


def test_the_argument_behind_the_colon(probe, run, config_file):
    assert run("--config", f"{config_file}:steps=12")[0] == 0
    assert probe.args.config.training.steps == 12
    assert run("--config", f"{config_file}:steps=12", "--config.training.steps=5")[0] == 0
    assert probe.args.config.training.steps == 5


def test_experiments_by_name(probe, run, mistake):
    assert run()[0] == 0
    assert probe.args.config.data.source == "digits"  # The default.
    assert run("--config", "imagenet256:size=B,quick", "--config.training.steps=5")[0] == 0
    config = probe.args.config
    assert (config.data.source, config.data.image_size, config.training.steps) == ("folder", 64, 5)
    assert mistake("--config=imagenet:size=L") == (
        "there is no experiment 'imagenet'; the built-in ones are ablations, base, cifar10, "
        "digits, imagenet256, mar256, and a file's name ends in .py"
    )
    assert "nowhere.py" in mistake("--config=nowhere.py")


# --- The remembered config ------------------------------------------------------------------------


def test_the_workdir_remembers_its_config(probe, run, remember, config_file, tmp_path):
    remember(f"--config={config_file}", "--config.training.steps=7")
    first = probe.args.config
    assert storage.read_json(tmp_path / "work" / "config.json")["training"]["steps"] == 7
    assert run("--config.training.rate=0.25")[0] == 0
    again = probe.args.config
    assert again.training.steps == 7
    assert again.training.rate == 0.25
    # JSON changes neither tuples, even nested and empty ones, nor types.
    assert again.nested == ((1, 2), (3,))
    assert again.empty == ()
    assert again.to_dict() == first.to_dict() | {
        "training": first.training.to_dict() | {"rate": 0.25}
    }
    assert {k: type(v) for k, v in again.items()} == {k: type(v) for k, v in first.items()}
    assert run("--config.sizes=(3,3)")[0] == 0
    assert probe.args.config.sizes == (3, 3)
    # Overrides are not remembered. A config file replaces the remembered config.
    assert run()[0] == 0
    assert (probe.args.config.training.rate, probe.args.config.sizes) == (0.5, (1, 2, 4))
    assert run("--config", config_file)[0] == 0
    assert probe.args.config.training.steps == 10
    # `--workdir=DIR` and `--workdir DIR` are the same.
    assert run(f"--workdir={tmp_path / 'work'}", workdir=None)[0] == 0
    assert probe.args.config.training.steps == 7


BASE = experiment("base").to_dict()
RENAMED = BASE | {
    "data": {key: value for key, value in BASE["data"].items() if key != "workers"},
    "tokenize": BASE["tokenize"] | {"decode_workers": 0},
}
OLD = BASE | {"model": {"mask_mean": 1.0, "class_dropout": 0.1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"training": ', "config.json is not valid JSON"),
        ("{}", "the config has no autoencoder, data"),
        # From an earlier version.
        (
            json.dumps(RENAMED),
            "the config has no data.workers (renamed from tokenize.decode_workers?), so it is from "
            "another version; add what is missing in the file it is read from",
        ),
        (json.dumps(OLD), "config.model has no key class_dropout, mask_mean; move class_dropout, "),
    ],
)
def test_a_wrong_remembered_config_is_named(mistake, tmp_path, content, message):
    storage.write_bytes(tmp_path / "work" / "config.json", content.encode())
    assert message in mistake()


def test_a_remembered_config_of_an_earlier_version_gets_the_new_keys(probe, run, tmp_path):
    older = BASE | {"mesh": {"data": -1, "fsdp": 2, "tensor": 1}}
    storage.write_bytes(tmp_path / "work" / "config.json", json.dumps(older).encode())
    status, _, err = run()
    assert (status, err.count("\n")) == (0, 1)
    assert "is from an earlier version; it gets mesh.slices=-1" in err
    assert probe.args.config.mesh.to_dict() == {"data": -1, "fsdp": 2, "tensor": 1, "slices": -1}


def test_a_value_that_is_not_set_can_be_set_later(probe, run, remember, config_file):
    remember(f"--config={config_file}")
    assert probe.args.config.epochs is None
    for value in (3, 0.5):
        assert run(f"--config.epochs={value}")[0] == 0
        assert probe.args.config.epochs == value


# --- Files of flags, and ~ ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        "--flagfile=run.flags",
        "--flagfile run.flags",
        "-flagfile=run.flags",
        "--workdir=other --flagfile=run.flags",
        "--count 3 --flagfile=run.flags",
        "--config.training.rate 0.5 --flagfile=run.flags",
        "--flagfile=outer.flags",
        "--workdir=other -workdir work",
        "--undefok=extra --extra=1 --flagfile=run.flags",
    ],
)
def test_the_workdir_is_found_anywhere_among_the_arguments(
    probe, run, remember, config_file, tmp_path, monkeypatch, argv
):
    monkeypatch.chdir(tmp_path)
    remember(f"--config={config_file}", "--config.training.steps=7")
    (tmp_path / "run.flags").write_text("# the run\n\n--workdir=work\n")
    (tmp_path / "outer.flags").write_text("--count=2\n--flagfile=run.flags\n")
    status, _, err = run(*argv.split(), workdir=None)
    assert (status, err) == (0, "")
    assert probe.args.workdir == "work"
    assert probe.args.config.training.steps == 7


def test_a_file_of_flags_may_name_the_config_and_change_it(
    probe, run, remember, config_file, tmp_path
):
    remember("--config=digits")
    (tmp_path / "run.flags").write_text(
        f"--config={config_file}:steps=12\n--config.training.rate=0.25\n--config.sizes=(9,)\n"
    )
    assert run(f"--flagfile={tmp_path / 'run.flags'}", "--config.training.fast=true")[0] == 0
    config = probe.args.config
    assert [config.training[key] for key in ("steps", "rate", "fast")] == [12, 0.25, True]
    assert (config.name, config.sizes) == ("plain", (9,))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_of_flags_that_cannot_be_read_is_named(mistake, tmp_path, content):
    if content:
        (tmp_path / "run.flags").write_bytes(content)
    assert mistake(f"--flagfile={tmp_path / 'run.flags'}").startswith("--flagfile cannot be read: ")


def test_a_home_is_expanded_after_an_equals_sign(
    probe, run, remember, mistake, config_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    remember("--workdir=~/work", "--config=~/config.py:steps=12", workdir=None)
    assert probe.args.workdir == str(tmp_path / "work")
    assert storage.read_json(tmp_path / "work" / "config.json")["training"]["steps"] == 12
    assert run("--workdir=~/work", workdir=None)[0] == 0
    assert probe.args.config.training.steps == 12  # From the workdir's config.
    for workdir, message in (
        ("~nobody-here/work", "--workdir: ~nobody-here/work: there is no user 'nobody-here'"),
        ("ü" * 130, "has 260 bytes, a file's at most 255"),
    ):
        assert message in mistake(f"--workdir={workdir}", workdir=None)


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--config.training.stepz=7"], "stepz"),
        (["--config.trainin.steps=7"], "trainin"),
        (["--config.training.steps=many"], "--config.training.steps=many"),
        (["--config.training.steps=1.5"], "--config.training.steps=1.5"),
        (["--config.training.fast=perhaps"], "--config.training.fast=perhaps"),
        (["--config.training=3"], "--config.training=3"),
        (["--count=x"], "--count=x"),
        (["--count"], "count"),
        (["--cuont=3"], "cuont"),
        (["stray"], "unexpected argument 'stray'"),
        (["--", "--count=3"], "unexpected argument '--count=3'"),
        (["--config.seed=-1"], "config.seed=-1 must be from 0 to 2**32 - 1"),
        ([f"--config.seed={2**32}"], "config.seed=4294967296 must be from 0 to 2**32 - 1"),
    ],
)
@pytest.mark.parametrize("remembered", [False, True])
def test_a_wrong_flag_is_named_in_one_line(remember, mistake, config_file, argv, named, remembered):
    if remembered:
        remember("--config", config_file)
    assert named in mistake(*argv if remembered else ("--config", config_file, *argv))


@pytest.mark.parametrize(
    ("text", "argument", "named"),
    [
        ("def get_config(arg=None):\n    return 1 / 0\n", "", "division by zero"),
        ("def get_config(arg=None\n", "", "was never closed"),
        (None, ":stepz=3", "no argument 'stepz'; it takes steps"),
        (None, ":steps=x", "config argument steps=x is not a int"),
    ],
)
def test_a_config_file_that_fails_gives_one_line(mistake, config_file, text, argument, named):
    if text:
        config_file.write_text(text)
    assert named in mistake(f"--config={config_file}{argument}")


def test_workdir_is_required(mistake):
    expected = "--workdir is not set; name the folder to work in: --workdir DIR"
    assert mistake(workdir=None) == expected


@pytest.mark.parametrize(
    ("store", "advice"),
    [
        ("gs", "needs gcsfs: pip install 'tokenbridge_jax[gcs]'"),
        ("s3", "not in s3://: mount the bucket as a folder"),
    ],
)
def test_an_object_store_that_cannot_be_used_is_named(mistake, monkeypatch, store, advice):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert advice in mistake("--config=digits", workdir=f"{store}://bucket/run")
