"""Processes that a command starts for a part of its work."""

import multiprocessing
import os
import threading

import jax


def begin() -> None:
    """Keeps this child process from the devices of its parent, and ends it when the parent ends.

    The parent may end by SIGKILL, while this process computes.
    """
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
