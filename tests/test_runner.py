"""The command runner: exit statuses and messages of a test command that runs in-process."""

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import pytest

from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime import processes
from tokenbridge_jax.runtime.errors import UserError

STACKS = "--fibers_default_thread_stack_size"  # A flag of libtpu.

pytest_plugins = ["probe"]


def test_a_command_may_choose_its_status(probe, run):
    for given, status in [(None, 0), (0, 0), (75, 75)]:
        probe.then = lambda args, given=given: given
        assert run()[0] == status


def failing(error):
    """A function that takes any arguments and raises an error."""

    def fail(*args, **options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("the folder is empty; put images there"), 2, "error: the folder is empty; put "
         "images there"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "terminated"),
    ],
)  # fmt: skip
def test_a_mistake_or_an_interrupt_gives_one_line(probe, run, error, status, message):
    probe.then = failing(error)
    assert run() == (status, "", f"tokenbridge probe: {message}\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", f"{STACKS}=4194304"),
        ("--a=1", f"--a=1 {STACKS}=4194304"),
        (f"{STACKS}=1", f"{STACKS}=1"),
    ],
)
def test_libtpu_gets_larger_stacks_unless_the_user_gives_a_size(
    probe, run, monkeypatch, given, expected
):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    found = []
    probe.then = lambda args: found.append(os.environ["LIBTPU_INIT_ARGS"])
    run()
    assert found == [expected]


def test_a_bug_gives_one_line_and_a_file_with_its_traceback(probe, run, tmp_path, monkeypatch):
    probe.then = failing(ZeroDivisionError("a bug\nat length"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, out, err = run()
    kept = list(tmp_path.glob("tokenbridge-probe-*.txt"))
    assert (status, out, len(kept)) == (1, "", 1)
    assert err == (
        f"tokenbridge probe: error: ZeroDivisionError: a bug; the whole traceback is in {kept[0]}\n"
    )
    text = kept[0].read_text()
    assert "Traceback" in text
    assert "in fail" in text
    assert text.endswith("ZeroDivisionError: a bug\nat length\n")
    # If no file can be written, the traceback goes to stderr.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "in fail" in run()[2]


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.ENOSPC, 2), (errno.EACCES, 2), (errno.EIO, 1), (errno.ESTALE, 1), (errno.ENOENT, 1)],
)
def test_an_error_of_the_system_is_named(probe, run, tmp_path, monkeypatch, code, status):
    probe.then = failing(OSError(code, os.strerror(code), "some/file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found, _, err = run()
    assert found == status  # 2 if a restart cannot help.
    assert f"error: cannot read or write some/file: {os.strerror(code)}; " in err
    assert err.count("\n") == 1


def test_distributed_joins_before_the_command_runs(probe, run, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: joined.append(1))
    monkeypatch.setattr(processes, "_tell_when_aborted", lambda: None)
    probe.then = lambda args: 10 + len(joined)
    assert run()[0] == 10
    assert run("--distributed")[0] == 11


NO_ADDRESS = ValueError("coordinator_address should be defined.")


def test_no_cluster_to_join_is_a_users_mistake(mistake, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", failing(NO_ADDRESS))
    line = mistake("--distributed")
    assert "--distributed" in line
    assert "coordinator_address" in line
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert mistake("--distributed") == "JAX_NUM_PROCESSES=two must be a number"


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
def test_wrong_settings_of_a_job_are_named(mistake, monkeypatch, variables, message):
    names = {
        "ADDRESS": "JAX_COORDINATOR_ADDRESS",
        "NUM": "JAX_NUM_PROCESSES",
        "ID": "JAX_PROCESS_ID",
        "LOCAL": "JAX_LOCAL_DEVICE_IDS",
    }
    for name, value in variables.items():
        monkeypatch.setenv(names.get(name, name), value)
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", failing(unknown))
    monkeypatch.setattr(processes, "NAME_SECONDS", -1)
    monkeypatch.setattr(processes, "_tell_when_aborted", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", failing(NO_ADDRESS))
    assert message in mistake("--distributed")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Backend 'cuda' is not in the")])
def test_missing_devices_are_named(mistake, monkeypatch, error):
    monkeypatch.setattr(jax, "devices", failing(error))
    assert "JAX_PLATFORMS=cpu asks for devices that JAX does not find here" in mistake()


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
    for text in ("--count", "--config", "--workdir", "--[no]distributed", "(default: 'digits')"):
        assert text in out
    assert probe.args is None


def main(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenbridge", *argv])
    return runner.main()


def test_the_console_script_runs_the_command(probe, monkeypatch, tmp_path):
    probe.then = lambda args: args.count
    assert main(monkeypatch, "probe", "--workdir", str(tmp_path), "--count=0") == 0
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, "probe", "--workdir", str(tmp_path), "--count=4")
    assert end.value.code == 4


def test_an_unknown_command_is_status_2_and_lists_all_commands(monkeypatch, capsys):
    assert main(monkeypatch, "trian", "--workdir", "x") == 2
    out, err = capsys.readouterr()
    assert err == "tokenbridge: there is no command 'trian'\n"
    for name in runner.COMMANDS:
        assert f"  {name} " in out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_usage_is_status_0(monkeypatch, capsys, argv):
    assert main(monkeypatch, *argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: tokenbridge COMMAND --workdir DIR")
    assert "JAX_ENABLE_COMPILATION_CACHE=false" in out
    assert err == ""


@pytest.mark.parametrize("name", ["train-vae", "tokenize", "train", "sample", "edit"])
def test_every_command_has_help(capsys, name):
    assert runner.run(name, ["--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir" in out
    assert len(out.splitlines()[0]) > 20


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(
    "command",
    [
        "train-vae --config.data.source=folder --config.data.path=/nowhere",
        "tokenize --config.data.source=folder --config.data.path=/nowhere",
        "train",
        "sample",
        "edit --input=/nowhere.png --keep=0.5",
        "import-torch --checkpoint=/nowhere.pth",
        "export-torch --out=out/model.pth",
        "evaluate generation --reference=data",
        "evaluate reconstruction",
        "evaluate likelihood --output=out",
        "evaluate tokens",
        "evaluate features --samples=/nowhere.npz --reference=/nowhere.npz --output=out",
        "evaluate reference --config.data.source=folder --config.data.path=/nowhere",
        "demo",
    ],
)
def test_a_command_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch, capsys, command, made):
    monkeypatch.chdir(tmp_path)
    name, *rest = command.split()
    if made:
        (tmp_path / "work").mkdir()
    before = set(tmp_path.rglob("*"))
    assert runner.run(name, [*rest, "--workdir=work"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("status", "seconds"), [(130, 20), (75, 20), (2, 20), (1, 20), (0, 0)])
def test_a_command_without_success_does_not_wait_for_threads(status, seconds):
    """XLA compiles in such threads."""
    code = (
        "import sys, threading, time\n"
        "from tokenbridge_jax.commands import runner\n"
        f"threading.Thread(target=time.sleep, args=[{seconds}]).start()\n"
        "print('closed')\n"
        f"sys.exit(runner.ended({status}))\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "closed\n")
    assert time.monotonic() - begun < 20
