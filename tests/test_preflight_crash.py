"""`tokenbridge preflight` when libtpu crashes, or when somebody stops the command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import wait_until

from tokenbridge_jax.commands import runner
from tokenbridge_jax.preflight import text

ROOT = Path(__file__).parent.parent

# It replaces libtpu. JAX asks it for a path in every process; in the one that compiles, it runs {}.
LIBTPU = """
import multiprocessing, os, time
def get_library_path():
    if multiprocessing.parent_process():
        {}
"""

COMPILE = ["--config=configs/imagenet256.py:quick", "--topology=v6e-64", "--config.mesh.fsdp=8"]


def test_a_crash_of_the_compiler_has_a_message_a_status_and_a_row(tmp_path, monkeypatch, capfd):
    (tmp_path / "libtpu.py").write_text(LIBTPU.format("os.kill(os.getpid(), 11)"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert runner.run("preflight", [*COMPILE, "--json"]) == 4
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    for named in ("SIGSEGV", "v6e:8x8", "fsdp=8", "remat none", "head_chunk", "another version"):
        assert named in last
    report = json.loads(out)
    assert report["fits"] is False
    row = text.table({"v6e-64 L": report}).splitlines()[-1]
    assert "fsdp 8, remat none, head_chunk 4096 |  | libtpu crashed |" in row
    assert runner.run("preflight", COMPILE) == 4
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_the_compiler_ends_with_the_command(tmp_path, monkeypatch, number, status):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    told = tmp_path / "pid"
    work = f"open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    (tmp_path / "libtpu.py").write_text(LIBTPU.format(work))
    command = [sys.executable, "-m", "tokenbridge_jax.commands.preflight", *COMPILE]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as parent:
        try:
            wait_until(lambda: told.exists() and told.read_text())
            parent.send_signal(number)
            assert parent.wait(20) == status
        finally:
            parent.kill()
    wait_until(lambda: not Path(f"/proc/{told.read_text()}").exists())
