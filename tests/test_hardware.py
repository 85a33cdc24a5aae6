"""The entry of a device in the table of peaks, and the cores and memory of a host."""

import os

import pytest

from tokenbridge_jax.runtime import hardware
from tokenbridge_jax.runtime.hardware import host_cores, host_memory, listed_flops


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        # Not listed, but their names contain a listed name.
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GB200", None),
    ],
)
def test_names_are_whole_words(kind, tera):
    assert listed_flops(kind) == (tera and tera * 1e12)


def test_the_memory_of_a_container_counts(monkeypatch, tmp_path):
    with open("/proc/meminfo") as file:
        _, total, unit = file.readline().split()
    assert unit == "kB"
    monkeypatch.setattr(hardware, "_LIMITS", tmp_path)
    all_of_it = int(total) * 2**10
    for text, expected in ((None, all_of_it), ("max\n", all_of_it), ("4096\n", 4096)):
        if text:
            (tmp_path / "memory.max").write_text(text)
        assert host_memory() == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", 6), ("250000 100000", 3), ("50000 100000", 1), (None, 6)]
)
def test_the_cores_of_a_container_count(monkeypatch, tmp_path, text, expected):
    if text:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
    monkeypatch.setattr(hardware, "_LIMITS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert host_cores() == expected
