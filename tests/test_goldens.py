"""Parity with arrays of the reference: `.npz` files in tests/goldens and $TOKENBRIDGE_GOLDENS.

Every kind of file has its own check. Sizes are read from the file. An unknown kind fails.
"""

import os
from pathlib import Path

import pytest
from goldens_autoencoder import check_autoencoder_file
from goldens_mar import check_mar_file
from goldens_model import check_model_file
from goldens_quantizer import check_quantizer_file

CHECKS = {
    "tokenbridge_": check_model_file,
    "mar_": check_mar_file,
    "quantizer": check_quantizer_file,
    "kl_vae_": check_autoencoder_file,
}


def golden_files() -> list[Path]:
    """All golden files; a named folder without any is an error."""
    places = [Path(__file__).parent / "goldens"]
    if extra := os.environ.get("TOKENBRIDGE_GOLDENS"):
        places += map(Path, extra.split(os.pathsep))
    files = [[p] if p.suffix == ".npz" else sorted(p.rglob("*.npz")) for p in places]
    empty = [str(place) for place, found in zip(places, files, strict=True) if not found]
    assert not empty, f"no .npz under {', '.join(empty)} ($TOKENBRIDGE_GOLDENS)"
    return [path for found in files for path in found]


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_golden(path: Path):
    checks = [check for prefix, check in CHECKS.items() if path.name.startswith(prefix)]
    assert checks, f"{path.name} is of no known kind ({', '.join(CHECKS)})"
    checks[0](path)


def test_all_kinds_are_there():
    names = [path.name for path in golden_files()]
    assert all(any(name.startswith(prefix) for name in names) for prefix in CHECKS)
