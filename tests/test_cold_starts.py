"""The script that measures cold and warm starts: its commands, seconds and failures."""

import importlib
import os
import subprocess
import sys

import pytest
from checkout import LAUNCH
from jobs import REPOSITORY

from tokenbridge_jax.commands import runner

# They compute nothing, or (the last two) measure compiling themselves.
OTHERS = {"import-torch", "export-torch", "import-metrics", "benchmark", "preflight"}


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LAUNCH)
        return importlib.import_module("cold_starts")


def test_every_command_that_computes_is_measured_with_flags_that_it_has(
    script, monkeypatch, tmp_path
):
    measured = set()
    for command in script.STARTS.values():
        flags = ["--config.seed=1"]
        name, *argv = script.complete(command, "digits:quick", flags, tmp_path / "x.png")
        module = importlib.import_module(f"tokenbridge_jax.commands.{runner.COMMANDS[name][0]}")
        called = []
        monkeypatch.setattr(module, "main", lambda *args, called=called: called.append(args))
        assert runner.run(name, [*argv, f"--workdir={tmp_path}"]) == 0
        ((args, *_),) = called
        assert args.config.seed == 1
        measured.add(name)
    assert measured == runner.COMMANDS.keys() - OTHERS


def test_seconds_are_those_of_the_process_and_its_children(script):
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"

    def run() -> float:
        subprocess.run([sys.executable, "-c", outer], check=True)
        return 7.0

    clock, cpu = script.timed(run)
    assert clock == 7
    assert 0.5 <= cpu < 2


def test_a_command_that_fails_is_named(script, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with pytest.raises(RuntimeError, match="error: Unknown command line flag 'nonsense'"):
        script.until_the_end(["tokenize", "--nonsense"], environment, 60)


def test_the_cache_is_the_scripts_own(script, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/another")
    environment = script.environment(tmp_path)
    assert not [name for name in environment if "COMPILATION_CACHE" in name]
    assert environment["XDG_CACHE_HOME"] == str(tmp_path)
