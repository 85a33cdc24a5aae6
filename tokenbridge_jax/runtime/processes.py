"""The processes of a job: how they join each other, agree, and leave together.

Processes agree through the job's coordination service (a key-value store with barriers in process
0), never by a program on the devices. A host reads the result of such a program from one of its
devices. If the process ends while its other devices still communicate, the others wait forever.

The death of a process is noticed within `HEARTBEAT_SECONDS`. The others then end with status
`EXIT_LOST`; above their last line the coordination service prints which process died. (A process
that aborts for another reason ends in the same way: the two cannot be distinguished.)
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

# Exit status if another process of the job is gone. (EX_PROTOCOL of sysexits.h.)
EXIT_LOST = 76

HEARTBEAT_SECONDS = 60  # Unless $TOKENBRIDGE_HEARTBEAT_SECONDS says otherwise.

# How long a process that has failed waits for the others to fail too.
FAILURE_SECONDS = 10

# How long the name of process 0's host may be unknown: Kubernetes adds it when the host starts.
NAME_SECONDS = 20

# Waits have no limit: the other process is alive, or the service notices its death.
_FOREVER = 7 * 24 * 3600

_NO_TASK = (
    "--distributed: this is in a job of Slurm, but srun has not started it as one of its tasks; "
    "start it by: srun tokenbridge COMMAND --distributed ..."
)

_meetings = itertools.count()
_on_abort: Any = None  # Kept alive here, because C holds only a pointer to it.


def join(distributed_flag: bool, *, asks_for_signals: bool = False) -> None:
    """Joins the other processes of the job. It must be called before any device is used.

    Without the flag a process works alone. With it, it is an error if no cluster is found. The
    cluster is given by `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`. Without these, JAX finds it on TPU pods, Slurm, Open MPI and Kubernetes.

    Args:
      distributed_flag: whether there are other processes.
      asks_for_signals: the command checks by itself whether any process received a SIGTERM, with
        `multihost_utils.reached_preemption_sync_point`. Otherwise SIGTERM ends a process.

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
            num_processes=number, process_id=process, heartbeat_timeout_seconds=heartbeat_seconds()
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
    """Waits until every process has called this, and returns the texts of all, in their order."""
    job = distributed.global_state
    if job.client is None:
        return [text]
    name = f"tokenbridge/{next(_meetings)}"
    job.client.key_value_set(f"{name}/{job.process_id}", text)
    job.client.wait_at_barrier(name, _FOREVER * 1000)
    said = dict(job.client.key_value_dir_get(f"{name}/"))
    return [said[f"{name}/{i}"] for i in range(job.num_processes)]


def leave(status: int, patience: int = _FOREVER) -> int:
    """Ends this process with `status` when all have called this; alone, it returns `status`.

    The runtime is not shut down in order. Devices may still communicate with those of a process
    that has already left, and would wait for its answer forever.

    Args:
      status: of this process; the others may have another one.
      patience: seconds after which this process ends alone; the others then notice its death.
    """
    job = distributed.global_state
    if job.client is None:
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    # The barrier itself has the time limit of the process that came first.
    message = f"ends; the others follow within {heartbeat_seconds()} s"
    alarm = threading.Timer(patience, _end, [status, message])
    alarm.daemon = True
    alarm.start()
    try:
        job.client.wait_at_barrier("tokenbridge/leave", _FOREVER * 1000)
        jax.distributed.shutdown()
    except RuntimeError as error:
        print(str(error).partition("\n")[0], file=sys.stderr, flush=True)
        _tell_lost()
    os._exit(status)


def heartbeat_seconds() -> int:
    """After how many seconds the death of a process is noticed."""
    return _number("TOKENBRIDGE_HEARTBEAT_SECONDS") or HEARTBEAT_SECONDS


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"{name}={text} must be a number")
    return None if text is None else int(text)


def _check(number: int | None, process: int | None, address: str | None) -> None:
    """Checks for mistakes after which JAX would wait for minutes or print an obscure message."""
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
    """Explains to the user when the coordination service ends this process.

    The service prints a stack trace and calls `abort`, and has no hook.
    """
    global _on_abort
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _tell_lost())
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def _tell_lost() -> None:
    """Ends this process because another one is gone."""
    _end(
        EXIT_LOST,
        "ends: another process of this job is gone or did not come, most likely (see above); "
        "start the job again",
    )


def _end(status: int, message: str) -> None:
    """Ends this process at once, without waiting for its threads."""
    os.write(2, f"process {distributed.global_state.process_id} {message}\n".encode())
    os._exit(status)
