"""The entry of a device in the table of peaks."""

import pytest

from tokenbridge_jax.runtime.hardware import listed_flops


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
