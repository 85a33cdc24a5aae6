"""Checks one `quantizer*.npz` golden against the quantizer."""

from pathlib import Path

import jax
import numpy as np

from tokenbridge_jax.quantizer import Quantizer


def quantizer_groups(path: Path) -> list[tuple[Quantizer, dict[str, np.ndarray]]]:
    """Returns each quantizer of a file, made of its golden level values, with its arrays."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    groups = []
    for group in sorted({name.split("/")[0] for name in arrays}):
        golden = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{group}/")}
        levels, limit = group.removeprefix("K").split("_r")
        assert golden["reconstruction_values"].shape == (int(levels),), group
        values = tuple(golden["reconstruction_values"].tolist())
        groups.append((Quantizer(values, -float(limit), float(limit)), golden))
    assert groups, f"{path} holds no quantizer"
    return groups


def check_quantizer_file(path: Path) -> None:
    """Indices must be equal with the golden levels; with own levels, except near midpoints."""
    for quantizer, golden in quantizer_groups(path):
        indices = np.asarray(jax.jit(quantizer.quantize)(golden["x"]))
        np.testing.assert_array_equal(indices, golden["indices"])
        values = np.asarray(jax.jit(quantizer.dequantize)(indices))
        limit = np.abs(golden["values"]).max()
        np.testing.assert_allclose(values, golden["values"], rtol=0, atol=1e-6 * limit)

        own = Quantizer.gaussian(quantizer.levels, quantizer.maximum)
        golden_levels = golden["reconstruction_values"]
        # A level is a difference of two float32 values of Phi, divided by the bin's mass, which
        # shrinks with V.
        tolerance = max(2e-5, 3e-7 * quantizer.levels) * np.abs(golden_levels).max()
        np.testing.assert_allclose(own.level_values, golden_levels, rtol=0, atol=tolerance)
        np.testing.assert_allclose(own.boundaries(), golden["boundaries"], rtol=0, atol=tolerance)

        own_indices = np.asarray(own.quantize(golden["x"])).astype(int)
        differ = own_indices != golden["indices"]
        levels_on_latents = np.sort(np.asarray(quantizer.dequantized_levels, np.float64))
        midpoints = (levels_on_latents[1:] + levels_on_latents[:-1]) / 2
        distance = np.abs(golden["x"][differ, None] - midpoints).min(axis=1, initial=np.inf)
        moved = tolerance * 2 * quantizer.maximum / 6  # The tolerance in units of latents.
        assert (distance < moved).all(), "own levels disagree away from every midpoint"
        assert (np.abs(own_indices - golden["indices"]) <= 1).all()
