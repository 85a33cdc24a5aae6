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


def test_the_second_start_finds_the_programs_of_the_first_and_of_no_other(
    script, monkeypatch, capsys
):
    """The measured commands are replaced: the n-th start takes n seconds and 10 n of CPU."""
    starts = []

    def measure(argv, environment, timeout):
        starts.append((environment["XDG_CACHE_HOME"], argv[-1]))
        return script.Seconds(len(starts), 10 * len(starts))

    monkeypatch.setattr(script, "until_the_end", measure)
    monkeypatch.setattr(script, "until_first_image", measure)
    monkeypatch.setattr(script, "STARTS", {"draw": ["sample"], "the page": ["demo"]})
    monkeypatch.setattr(sys, "argv", ["cold_starts.py", "--config=digits"])
    assert script.main() == 0
    (one, cold), (two, warm), (three, _), (four, _) = starts
    assert one == two != three == four
    assert cold != warm
    lines = capsys.readouterr().out.splitlines()
    assert "| draw | 1.0 s | 10.0 s | 2.0 s | 20.0 s |" in lines
    assert "| the page | 3.0 s | 30.0 s | 4.0 s | 40.0 s |" in lines


def test_a_workdir_without_a_config_is_one_line(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["cold_starts.py", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit):
        script.main()
    out, err = capsys.readouterr()
    assert out == ""
    assert f"--workdir {tmp_path} has no config.json" in err
