"""The compiler's counts for the programs of a call, and the names of their instructions."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

# A compiled program, as the client keeps it.
Program = Any

# Lines of a program's text: `%name (arguments) -> result {`, `  %name = f32[8] fusion(...), ...`.
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_SOURCE = re.compile(r'op_name="([^"]+)"')


def loaded_programs() -> list[Program]:
    """The compiled programs that this process holds."""
    return jax.local_devices()[0].client.live_executables()


def new_programs(before: Sequence[Program]) -> list[Program]:
    """The compiled programs that this process holds now, without those `before`."""
    known = {id(program) for program in before}
    return [program for program in loaded_programs() if id(program) not in known]


def count_flops(programs: Sequence[Program], devices: int) -> int | float | None:
    """XLA's count over all devices, with loop bodies once; None if XLA does not count."""
    counts = []
    for program in programs:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Not every platform counts.
            counts.append(program.cost_analysis().get("flops", 0.0))
    return devices * sum(counts) if counts else None


def planned_memory(programs: Sequence[Program]) -> dict[str, int] | None:
    """Bytes on one device that the largest program needs.

    `donated` are bytes that are counted twice: outputs reuse the memory of these arguments.
    """
    plans = [
        {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "donated": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
        }
        for stats in (program.get_compiled_memory_stats() for program in programs)
    ]
    return max(plans, key=lambda plan: sum(plan.values()) - 2 * plan["donated"], default=None)


def peak_memory() -> int | None:
    """The most bytes that a device of this process has used; None if devices do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(entry.get("peak_bytes_in_use", 0) for entry in stats) or None


def source_names(programs: Sequence[Program]) -> dict[str, str]:
    """Maps each instruction to the place in the code it comes from, `jit(step)/head/mlp/dot`.

    It is also listed by the name of its GPU kernel, `loop_add_fusion_3` for `loop_add_fusion.3`.
    """
    names: dict[str, str] = {}
    for program in programs:
        for module in program.hlo_modules():
            for instruction, source in sources(module.to_string()):
                names[instruction] = names[re.sub(r"[.\-]", "_", instruction)] = source
    return names


def sources(text: str) -> Iterator[tuple[str, str]]:
    """Instructions of a program's text with their sources.

    A fusion without a source gets that of its last instruction.
    """
    last: dict[str, str] = {}  # By computation. Callers follow the computations that they call.
    computation = ""
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            called = _CALLED.search(line)
            found = _SOURCE.search(line)
            source = found[1] if found else last.get(called[1], "") if called else ""
            if source:
                last[computation] = source
                yield instruction[1], source
        elif begins := _COMPUTATION.match(line):
            computation = begins[1]
