"""A command for tests that keeps its arguments, and is run in this process."""

import sys
import types

import pytest
from absl import flags

from tokenbridge_jax.commands import runner

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from tokenbridge_jax.config import experiment, parse_arg

def get_config(arg=None):
    argument = parse_arg(arg, steps=10)
    base = experiment("base").to_dict()
    return ConfigDict(base | dict(
        seed=0, name="plain", sizes=(1, 2, 4), nested=((1, 2), (3,)), empty=(),
        epochs=placeholder(float),
        training=base["training"] | dict(steps=argument.steps, rate=0.5, fast=False),
    ))
"""


class Probe:
    """A command that keeps its arguments and then calls `then(args)`."""

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


@pytest.fixture
def mistake(probe, run):
    """Runs the probe, which must not start; returns the line that names the mistake."""

    def mistake(*argv, **options):
        status, out, err = run(*argv, **options)
        assert (status, out, probe.args) == (2, "", None)
        assert err.startswith("tokenbridge probe: error: ")
        assert err.count("\n") == 1
        return err.removeprefix("tokenbridge probe: error: ").removesuffix("\n")

    return mistake


@pytest.fixture
def remember(probe, run):
    """Runs the probe as a command whose config the workdir remembers."""

    def remember(*argv, **options):
        probe.then = runner.remember_config
        assert run(*argv, **options)[0] == 0
        probe.then = lambda args: None

    return remember
