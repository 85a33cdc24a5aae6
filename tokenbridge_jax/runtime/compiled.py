"""Reads from the compiler how much memory a program needs."""

import re
from collections.abc import Callable
from typing import Any

import jax

from tokenbridge_jax.runtime import processes

# Bytes of the units in the compiler's messages.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled_bytes(compile_it: Callable[[], Any]) -> int | None:
    """Compiles a program on every process; returns the bytes that it needs on a device.

    Args:
      compile_it: compiles the program and returns it.

    Returns:
      The most of all processes; None if it does not fit and the compiler does not say how much.
    """
    needed: int | None
    try:
        needed, _ = program_bytes(compile_it())
    except jax.errors.JaxRuntimeError as error:
        needed = wanted_bytes(error)
        if needed is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
    said = processes.gather(str(needed))
    return None if "None" in said else max(map(int, said))


def program_bytes(compiled: Any) -> tuple[int, int]:
    """The bytes that a compiled program needs at once on a device, and those of the program."""
    memory = compiled.memory_analysis()
    code = memory.generated_code_size_in_bytes
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    # Not every backend counts its own peak, which is at most the sum.
    return (memory.peak_memory_in_bytes or held) + code, code


def wanted_bytes(error: Exception) -> int | None:
    """Reads from libtpu's message the bytes of a program that does not fit; None without them."""
    message = str(error)
    used = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    required = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available", message)
    found = used or required
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
