"""Reads from the compiler how much memory a program needs."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from tokenbridge_jax.runtime import processes

# Bytes of the units in the compiler's messages.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Trial(NamedTuple):
    """What compiling a program showed.

    Attributes:
      compiled: whether the compiler made the program.
      bytes: what the program needs on a device; None if the compiler does not say.
    """

    compiled: bool
    bytes: int | None


def try_to_compile(compile_it: Callable[[], Any]) -> Trial:
    """Compiles a program on every process.

    Args:
      compile_it: compiles the program and returns it.

    Returns:
      Whether all processes succeeded, and the most bytes of all.
    """
    try:
        trial = Trial(True, program_bytes(compile_it())[0])
    except jax.errors.JaxRuntimeError as error:
        trial = Trial(False, wanted_bytes(error))
        if trial.bytes is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
    trials = [Trial(*json.loads(text)) for text in processes.gather(json.dumps(trial))]
    known = [t.bytes for t in trials if t.bytes is not None]
    whole = max(known) if len(known) == len(trials) else None
    return Trial(all(t.compiled for t in trials), whole)


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
