"""Jobs of several real processes on this machine, connected over loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent


def start_job(
    command: Sequence[Any],
    of_process: Sequence[Sequence[Any]],
    *,
    devices: int = 8,
    output: Any = None,
    **variables: str,
) -> list[subprocess.Popen]:
    """Starts Python processes that join each other.

    Args:
      command: arguments of the interpreter, the same for all.
      of_process: further arguments of each process.
      devices: number of devices of each process.
      output: open file for stdout and stderr; None gives the caller stdout as a pipe.
      **variables: variables of the environment.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(len(of_process)),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command), *map(str, arguments)],
            env=os.environ | job | {"JAX_PROCESS_ID": str(index)} | variables,
            stdout=output or subprocess.PIPE,
            stderr=output,
            text=True,
        )
        for index, arguments in enumerate(of_process)
    ]


def wait_until(condition: Callable[[], Any]) -> Any:
    """Waits at most a minute until a condition is true; returns its value."""
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end, "the condition was not fulfilled in time"
        time.sleep(0.1)
    return value
