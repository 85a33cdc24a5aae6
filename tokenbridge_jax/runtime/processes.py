"""The processes of a job: how they find each other, agree, and leave together.

Processes agree through the job's coordination service (a key-value store with barriers in process
0), never by a program on the devices: a host reads such a program's result from one of its devices,
and a process that then ends while its others still talk leaves its neighbours waiting for ever.

A process that dies is missed after `HEARTBEAT_SECONDS` at most. The others then end with status
`EXIT_LOST`; the line of the coordination service above their last one says which process it was.
(A process of a job that aborts for any other reason ends likewise: the two cannot be told apart.)
"""

import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # The service's client has no public name.

from tokenbridge_jax.runtime import slurm
from tokenbridge_jax.runtime.errors import UserError

# Exit status where another process of the job is gone. (EX_PROTOCOL of sysexits.h.)
EXIT_LOST = 76

HEARTBEAT_SECONDS = 60  # Unless $TOKENBRIDGE_HEARTBEAT_SECONDS says otherwise.

# How long a process that has failed waits for the others to fail likewise.
FAILURE_SECONDS = 10

# How long the name of process 0's host may stay unknown: on Kubernetes it comes with the host.
NAME_SECONDS = 20

# For as long as it takes: whoever is waited for is alive, or missed by the service.
_FOREVER = 7 * 24 * 3600

_NO_TASK = (
    "--distributed: this is in a job of Slurm, but srun has not started it as one of its tasks; "
    "start it by: srun tokenbridge COMMAND --distributed ..."
)

_meetings = itertools.count()
_on_abort: Any = None  # Kept: C holds a bare pointer to it.


def join(distributed_flag: bool, *, asks_for_signals: bool = False) -> None:
    """Joins the other processes of the job, before any device is touched.

    Nothing is guessed: without the flag a process stands alone; with it, a cluster that cannot be
    found is an error instead of a silent single-process run. The cluster is what
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
    say, and otherwise what JAX finds on TPU pods, Slurm, Open MPI and Kubernetes.

    Args:
      distributed_flag: whether there are others to join.
      asks_for_signals: the command looks for a SIGTERM to any process by itself, with
        `multihost_utils.reached_preemption_sync_point`; elsewhere SIGTERM ends a process.

    Raises:
      UserError: there is no cluster to join.
    """
    if not distributed_flag:
        return
    number, process = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    _check(number, process, os.environ.get("JAX_COORDINATOR_ADDRESS"))
    if os.environ.get("SLURM_PROCID") == "0" and (idle := slurm.idle_gpus()):
        print(idle, file=sys.stderr)
    jax.config.update("jax_enable_preemption_service", asks_for_signals)
    _tell_when_aborted()
    try:
        jax.distributed.initialize(
            num_processes=number,
            process_id=process,
            heartbeat_timeout_seconds=heartbeat_seconds(),
        )
    except (ValueError, TypeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())
        if slurm.left_out():
            raise UserError(_NO_TASK) from error
        raise UserError(
            f"--distributed found no cluster to join ({reason}); on machines without a cluster "
            "manager set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def alone() -> bool:
    """Whether this process has joined no others."""
    return distributed.global_state.client is None


def gather(text: str) -> list[str]:
    """Waits until every process has called this; what each of them said, by process."""
    job = distributed.global_state
    if job.client is None:
        return [text]
    name = f"tokenbridge/{next(_meetings)}"
    job.client.key_value_set(f"{name}/{job.process_id}", text)
    job.client.wait_at_barrier(name, _FOREVER * 1000)
    said = dict(job.client.key_value_dir_get(f"{name}/"))
    return [said[f"{name}/{i}"] for i in range(job.num_processes)]


def leave(status: int, patience: int = _FOREVER) -> int:
    """Ends this process with `status` once all are here; alone, it just returns `status`.

    The runtime is not taken down piece by piece: where devices still talk to those of a process
    that is ahead in this, that would wait for an answer for ever.

    Args:
      status: of this process; the others may have another.
      patience: seconds after which it goes without the others, who then miss it.
    """
    job = distributed.global_state
    if job.client is None:
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    # The barrier itself has the patience of whoever came first.
    alarm = threading.Timer(patience, _leave_alone, [status])
    alarm.daemon = True
    alarm.start()
    try:
        job.client.wait_at_barrier("tokenbridge/leave", _FOREVER * 1000)
        jax.distributed.shutdown()
    except RuntimeError as error:
        print(str(error).partition("\n")[0], file=sys.stderr, flush=True)
        _tell_lost()
    os._exit(status)


def _leave_alone(status: int) -> None:
    """Ends this process without the others."""
    _end(status, f"ends; the others follow within {heartbeat_seconds()} s")


def heartbeat_seconds() -> int:
    """After how many seconds a process that is gone is missed."""
    return _number("TOKENBRIDGE_HEARTBEAT_SECONDS") or HEARTBEAT_SECONDS


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"{name}={text} must be a number")
    return None if text is None else int(text)


def _check(number: int | None, process: int | None, address: str | None) -> None:
    """Finds what would let JAX wait for minutes, or fail in its own words."""
    if number == 0:
        raise UserError("JAX_NUM_PROCESSES=0 must be at least 1")
    if number is not None and process is not None and process >= number:
        raise UserError(
            f"JAX_PROCESS_ID={process} must be below JAX_NUM_PROCESSES={number}: processes are "
            "counted from 0"
        )
    for part in os.environ.get("JAX_LOCAL_DEVICE_IDS", "0").split(","):
        if part and not part.strip().isdecimal():
            raise UserError(f"JAX_LOCAL_DEVICE_IDS holds '{part}'; it must be numbers, such as 0,1")
    if address is not None:
        _check_address(address)
    elif number is None and slurm.is_task() and slurm.left_out():
        raise UserError(_NO_TASK)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT, with a port of process 0's host "
            "that nobody else listens on, such as 10.0.0.1:8476"
        )
    deadline = time.monotonic() + NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS={address}: this machine knows no host '{host}'; "
                    "check the name, or give the host's IP address"
                ) from error
        time.sleep(1)


def _tell_when_aborted() -> None:
    """Says what it means, and what to do, when the coordination service ends this process.

    It does so with a stack trace and `abort`, and offers no hook.
    """
    global _on_abort
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _tell_lost())
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def _tell_lost() -> None:
    """Ends this process where another is gone."""
    _end(
        EXIT_LOST,
        "ends: another process of this job is gone or did not come, most likely (see above); "
        "start the job again",
    )


def _end(status: int, words: str) -> None:
    """Ends this process at once, whatever its threads are in the middle of."""
    os.write(2, f"process {distributed.global_state.process_id} {words}\n".encode())
    os._exit(status)
