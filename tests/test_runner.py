"""The command runner in-process, with a command of the tests' own: statuses, messages, configs."""

import errno
import importlib.util
import os
import socket
import sys
import tempfile
import types

import jax
import pytest
from absl import flags

from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime import processes, storage
from tokenbridge_jax.runtime.errors import UserError

# How ml_collections imports a config file.

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from tokenbridge_jax.commands.runner import SECTIONS
from tokenbridge_jax.config import parse_arg

def get_config(arg=None):
    argument = parse_arg(arg, steps=10)
    sections = {name: {} for name in SECTIONS}
    return ConfigDict(sections | dict(
        seed=0, name="plain", sizes=(1, 2, 4), nested=((1, 2), (3,)), empty=(),
        epochs=placeholder(float),
        training=dict(steps=argument.steps, rate=0.5, fast=False),
    ))
"""


class Probe:
    """A command that keeps what it was given and then does `then(args)`."""

    def __init__(self):
        self.module = types.ModuleType("tokenbridge_jax.commands.probe", "Probes.\n\nAt length.")
        self.module.define_flags = self.define_flags
        self.module.main = self.main
        self.args = None
        self.then = lambda args: None

    def define_flags(self, flag_values):
        flags.DEFINE_integer("count", 1, "How many.", flag_values=flag_values)

    def main(self, args):
        self.args = args
        return self.then(args)


@pytest.fixture
def probe(monkeypatch):
    probe = Probe()
    monkeypatch.setitem(sys.modules, probe.module.__name__, probe.module)
    monkeypatch.setitem(runner.COMMANDS, "probe", ("probe", "for the tests"))
    return probe


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(probe, tmp_path, capsys):
    """Runs the probe in a workdir; returns `(status, stdout, stderr)`."""

    def run(*argv, workdir=tmp_path / "work"):
        given = ["--workdir", str(workdir)] if workdir else []
        probe.args = None
        status = runner.run("probe", [*given, *map(str, argv)])
        return status, *capsys.readouterr()

    return run


# --- What a command gets --------------------------------------------------------------------------


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
    with pytest.raises(AttributeError, match="steeps"):  # Locked: a typo in code shows too.
        config.training.steeps = 1


def test_the_argument_behind_the_colon(probe, run, config_file):
    assert run("--config", f"{config_file}:steps=12")[0] == 0
    assert probe.args.config.training.steps == 12
    assert run("--config", f"{config_file}:steps=12", "--config.training.steps=5")[0] == 0
    assert probe.args.config.training.steps == 5


def test_without_a_config_it_is_the_digits(probe, run):
    assert run()[0] == 0
    assert probe.args.config.data.source == "digits"
    assert runner.default_config_file().name == "digits.py"


def test_a_command_may_choose_its_status(probe, run):
    for given, status in [(None, 0), (0, 0), (75, 75)]:
        probe.then = lambda args, given=given: given
        assert run()[0] == status


# --- The remembered config ------------------------------------------------------------------------


def test_the_workdir_remembers_its_config(probe, run, config_file, tmp_path):
    probe.then = runner.remember_config
    assert run(f"--config={config_file}", "--config.training.steps=7")[0] == 0
    first = probe.args.config
    assert storage.read_json(tmp_path / "work" / "config.json")["training"]["steps"] == 7

    probe.then = lambda args: None
    assert run("--config.training.rate=0.25")[0] == 0
    again = probe.args.config
    assert again.training.steps == 7
    assert again.training.rate == 0.25
    # Tuples survive JSON, nested and empty ones too; so do types.
    assert again.nested == ((1, 2), (3,))
    assert again.empty == ()
    assert again.to_dict() == first.to_dict() | {
        "training": {"steps": 7, "rate": 0.25, "fast": False}
    }
    assert {k: type(v) for k, v in again.items()} == {k: type(v) for k, v in first.items()}
    assert run("--config.sizes=(3,3)")[0] == 0
    assert probe.args.config.sizes == (3, 3)
    # An override alone is not remembered; a config file takes the remembered one's place.
    assert run()[0] == 0
    assert (probe.args.config.training.rate, probe.args.config.sizes) == (0.5, (1, 2, 4))
    assert run("--config", config_file)[0] == 0
    assert probe.args.config.training.steps == 10
    # `--workdir=DIR` and `--workdir DIR` are the same.
    assert run(f"--workdir={tmp_path / 'work'}", workdir=None)[0] == 0
    assert probe.args.config.training.steps == 7


def test_a_config_of_an_earlier_version_gets_the_keys_that_have_come_since(probe, run, tmp_path):
    assert run("--config", runner.default_config_file())[0] == 0
    now = probe.args.config
    config = now.to_dict()
    for section, key in (
        ("model", "scan_layers"),
        ("model", "head"),
        ("model", "channels_per_group"),
        ("model", "channel_order"),
        ("training", "head_fraction"),
        ("sampling", "guidance_interval"),
        ("sampling", "order"),
        ("sampling", "choice_temperature"),
        ("training", "keep_every"),
        ("vae_training", "keep_every"),
    ):
        del config[section][key]
    config["model"]["head_chunk"] = 16  # slots of an image, then
    storage.write_json(tmp_path / "work" / "config.json", config)
    assert run("--config.training.head_fraction=0.5")[0] == 0
    found = probe.args.config
    assert found.model.scan_layers
    assert (found.model.head, found.model.channels_per_group) == ("channel_ar", 1)
    assert found.model.channel_order == "tokens"
    assert found.model.head_chunk == now.model.head_chunk
    assert found.training.head_fraction == 0.5
    assert found.sampling.guidance_interval == (0.0, 1.0)
    assert (found.sampling.order, found.sampling.choice_temperature) == ("random", 1.0)
    assert found.training.keep_every == found.vae_training.keep_every == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"training": ', "config.json is not valid JSON"), (b"{}", "the config has no seed, data")],
)
def test_a_damaged_remembered_config_is_named(run, tmp_path, content, message):
    storage.write_bytes(tmp_path / "work" / "config.json", content)
    status, _, err = run()
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_value_that_is_not_set_can_be_set_later(probe, run, config_file):
    probe.then = runner.remember_config
    assert run(f"--config={config_file}")[0] == 0
    assert probe.args.config.epochs is None
    probe.then = lambda args: None
    for value in (3, 0.5):
        assert run(f"--config.epochs={value}")[0] == 0
        assert probe.args.config.epochs == value


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_named(run, config_file, seed):
    status, _, err = run(f"--config={config_file}", f"--config.seed={seed}")
    assert status == 2
    assert f"config.seed={seed} must be from 0 to 2**32 - 1" in err


# --- Files of flags, and ~ ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--flagfile=F"],
        ["--flagfile", "F"],
        ["-flagfile=F"],
        ["--workdir=other", "--flagfile=F"],
        ["--count", "3", "--flagfile=F"],
        ["--config.training.rate", "0.5", "--flagfile=F"],
        ["--flagfile=NESTED"],
        ["--workdir=other", "-workdir", "W"],
        ["--undefok=extra", "--extra=1", "--flagfile=F"],
    ],
)
def test_the_workdir_is_found_wherever_it_is_named(
    probe, run, config_file, tmp_path, monkeypatch, argv
):
    monkeypatch.chdir(tmp_path)
    probe.then = runner.remember_config
    assert run(f"--config={config_file}", "--config.training.steps=7")[0] == 0
    files = {"F": tmp_path / "run.flags", "NESTED": tmp_path / "outer.flags"}
    files["F"].write_text(f"# the run\n\n--workdir={tmp_path / 'work'}\n")
    files["NESTED"].write_text(f"--count=2\n--flagfile={files['F']}\n")
    argv = [a.replace("NESTED", str(files["NESTED"])) for a in argv]
    argv = [str(tmp_path / "work") if a == "W" else a for a in argv]
    argv = [a.removesuffix("F") + str(files["F"]) if a.endswith("F") else a for a in argv]
    probe.then = lambda args: None
    status, _, err = run(*argv, workdir=None)
    assert (status, err) == (0, "")
    assert probe.args.workdir == str(tmp_path / "work")
    assert probe.args.config.training.steps == 7


def test_a_file_of_flags_may_name_the_config_and_change_it(probe, run, config_file, tmp_path):
    probe.then = runner.remember_config
    assert run("--config", runner.default_config_file())[0] == 0
    (tmp_path / "run.flags").write_text(
        f"--config={config_file}:steps=12\n--config.training.rate=0.25\n--config.sizes=(9,)\n"
    )
    probe.then = lambda args: None
    assert run(f"--flagfile={tmp_path / 'run.flags'}", "--config.training.fast=true")[0] == 0
    config = probe.args.config
    assert (config.name, config.training.to_dict()) == (
        "plain",
        {"steps": 12, "rate": 0.25, "fast": True},
    )
    assert config.sizes == (9,)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_of_flags_that_cannot_be_read_is_named(run, tmp_path, content):
    if content:
        (tmp_path / "run.flags").write_bytes(content)
    status, _, err = run(f"--flagfile={tmp_path / 'run.flags'}")
    assert (status, err.count("\n")) == (2, 1)
    assert "--flagfile cannot be read: " in err


def test_a_home_is_found_behind_an_equals_sign(probe, run, config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    probe.then = runner.remember_config
    assert run("--workdir=~/work", "--config=~/config.py:steps=12", workdir=None)[0] == 0
    assert probe.args.workdir == str(tmp_path / "work")
    assert storage.read_json(tmp_path / "work" / "config.json")["training"]["steps"] == 12
    probe.then = lambda args: None
    assert run("--workdir=~/work", workdir=None)[0] == 0
    assert probe.args.config.training.steps == 12  # And so is what the workdir remembers.
    status, _, err = run("--workdir=~nobody-here/work", workdir=None)
    assert (status, err.count("\n")) == (2, 1)
    assert "--workdir: ~nobody-here/work: there is no user 'nobody-here'" in err
    status, _, err = run("--workdir=" + "ü" * 130, workdir=None)
    assert (status, err.count("\n")) == (2, 1)
    assert "has 260 bytes, a file's at most 255" in err


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
    ],
)
@pytest.mark.parametrize("remembered", [False, True])
def test_a_wrong_flag_is_named_in_one_line(probe, run, config_file, argv, named, remembered):
    if remembered:
        probe.then = runner.remember_config
        assert run("--config", config_file)[0] == 0
        status, out, err = run(*argv)
    else:
        status, out, err = run("--config", config_file, *argv)
    assert status == 2
    assert probe.args is None, "the command must not run"
    assert out == ""
    assert err.startswith("tokenbridge probe: error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("text", "argument", "named"),
    [
        (None, "", "nowhere.py"),
        ("def get_config(arg=None):\n    return 1 / 0\n", "", "division by zero"),
        ("def get_config(arg=None\n", "", "was never closed"),
        (CONFIG, ":stepz=3", "no argument 'stepz'; it takes steps"),
        (CONFIG, ":steps=x", "steps=x is not a int"),
    ],
)
def test_a_config_file_that_fails_is_one_line(run, tmp_path, text, argument, named):
    path = tmp_path / "nowhere.py"
    if text:
        path.write_text(text)
    status, out, err = run(f"--config={path}{argument}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_workdir_is_required(probe, run):
    status, _, err = run(workdir=None)
    assert status == 2
    assert probe.args is None
    assert err == (
        "tokenbridge probe: error: --workdir is not set; name the folder to work in: "
        "--workdir DIR\n"
    )


def test_a_users_mistake_within_the_command_is_status_2(probe, run):
    def fail(args):
        raise UserError("the folder is empty; put images there")

    probe.then = fail
    expected = "tokenbridge probe: error: the folder is empty; put images there\n"
    assert run() == (2, "", expected)


def test_an_interrupt_is_status_130(probe, run):
    def interrupt(args):
        raise KeyboardInterrupt

    probe.then = interrupt
    assert run() == (130, "", "tokenbridge probe: interrupted\n")


def test_a_defect_is_one_line_and_a_file_with_its_traceback(probe, run, tmp_path, monkeypatch):
    def fail(args):
        raise ZeroDivisionError("a defect of ours\nat length")

    probe.then = fail
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, out, err = run()
    kept = list(tmp_path.glob("tokenbridge-probe-*.txt"))
    assert (status, out, len(kept)) == (1, "", 1)
    assert err == (
        "tokenbridge probe: error: ZeroDivisionError: a defect of ours; the whole traceback is in "
        f"{kept[0]}\n"
    )
    text = kept[0].read_text()
    assert "Traceback" in text
    assert "in fail" in text
    assert text.endswith("ZeroDivisionError: a defect of ours\nat length\n")
    # Where there is no place for a file, nothing is lost.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "in fail" in run()[2]


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.ENOSPC, 2), (errno.EACCES, 2), (errno.EIO, 1), (errno.ESTALE, 1), (errno.ENOENT, 1)],
)
def test_what_the_system_refuses_is_named(probe, run, tmp_path, monkeypatch, code, status):
    def fail(args):
        raise OSError(code, os.strerror(code), "some/file")

    probe.then = fail
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found, _, err = run()
    assert found == status  # 2 where it would be in vain to start again.
    assert f"error: cannot read or write some/file: {os.strerror(code)}; " in err
    assert err.count("\n") == 1


def test_distributed_joins_before_the_command_runs(probe, run, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: joined.append(1))
    monkeypatch.setattr(processes, "_tell_when_aborted", lambda: None)
    probe.then = lambda args: 10 + len(joined)
    assert run()[0] == 10
    assert run("--distributed")[0] == 11


def test_no_cluster_to_join_is_a_users_mistake(probe, run, monkeypatch):
    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    status, _, err = run("--distributed")
    assert status == 2
    assert "--distributed" in err
    assert "coordinator_address" in err
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert run("--distributed")[2].endswith("error: JAX_NUM_PROCESSES=two must be a number\n")
    assert probe.args is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1 must be HOST:PORT"),
        ({"ADDRESS": "node1:"}, "must be HOST:PORT"),
        ({"ADDRESS": ":8476"}, "must be HOST:PORT"),
        ({"ADDRESS": "node1:99999"}, "must be HOST:PORT"),
        ({"ADDRESS": "node1:8476"}, "this machine knows no host 'node1'"),
        ({"NUM": "2", "ID": "2"}, "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
        ({"NUM": "0"}, "JAX_NUM_PROCESSES=0 must be at least 1"),
        ({"ID": "-1"}, "JAX_PROCESS_ID=-1 must be a number"),
        ({"LOCAL": "0,x"}, "JAX_LOCAL_DEVICE_IDS holds 'x'"),
        ({"SLURM_JOB_ID": "7"}, "srun has not started it as one of its tasks"),
    ],
)
def test_a_job_that_cannot_come_together_is_told(probe, run, monkeypatch, variables, message):
    names = {
        "ADDRESS": "JAX_COORDINATOR_ADDRESS",
        "NUM": "JAX_NUM_PROCESSES",
        "ID": "JAX_PROCESS_ID",
        "LOCAL": "JAX_LOCAL_DEVICE_IDS",
    }
    for name, value in variables.items():
        monkeypatch.setenv(names.get(name, name), value)

    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(processes, "NAME_SECONDS", -1)
    monkeypatch.setattr(processes, "_tell_when_aborted", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    status, _, err = run("--distributed")
    assert (status, err.count("\n"), probe.args) == (2, 1, None)
    assert message in err


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Backend 'cuda' is not in the")])
def test_devices_that_are_not_there_are_named(probe, run, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    status, _, err = run()
    assert (status, err.count("\n"), probe.args) == (2, 1, None)
    assert "JAX_PLATFORMS=cpu asks for devices that JAX does not find here" in err


def test_commands_compute_in_32_bits(probe, run):
    jax.config.update("jax_enable_x64", True)
    try:
        probe.then = lambda args: int(jax.numpy.arange(2.0).dtype.itemsize)
        assert run()[0] == 4
    finally:
        jax.config.update("jax_enable_x64", False)


# --- Help and the console script ------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_shows_the_docstring_and_the_flags(probe, run, flag):
    status, out, err = run(flag, workdir=None)
    assert (status, err) == (0, "")
    assert out.startswith("Probes.\n\nAt length.\n")
    for name in ("--count", "--config", "--workdir", "--[no]distributed"):
        assert name in out
    assert probe.args is None


def main(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenbridge", *argv])
    return runner.main()


def test_the_console_script_runs_the_command(probe, monkeypatch, tmp_path):
    probe.then = lambda args: args.count
    assert main(monkeypatch, "probe", "--workdir", str(tmp_path), "--count=4") == 4


def test_an_unknown_command_is_status_2_and_lists_those_there_are(monkeypatch, capsys):
    assert main(monkeypatch, "trian", "--workdir", "x") == 2
    out, err = capsys.readouterr()
    assert err == "tokenbridge: there is no command 'trian'\n"
    for name in runner.COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_usage_is_no_mistake(monkeypatch, capsys, argv):
    assert main(monkeypatch, *argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: tokenbridge COMMAND --workdir DIR")
    assert err == ""


@pytest.mark.parametrize("name", ["train-vae", "tokenize", "train", "sample", "edit"])
def test_every_command_has_help(capsys, name):
    assert runner.run(name, ["--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir" in out
    assert len(out.splitlines()[0]) > 20


@pytest.mark.parametrize(
    ("store", "mend"),
    [
        ("gs", "needs gcsfs: pip install 'tokenbridge_jax[gcs]'"),
        ("s3", "not in s3://: mount the bucket as a folder"),
    ],
)
def test_an_object_store_that_cannot_be_used_is_named(run, monkeypatch, config_file, store, mend):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(f"--config={config_file}", workdir=f"{store}://bucket/run")
    assert status == 2
    assert mend in err
