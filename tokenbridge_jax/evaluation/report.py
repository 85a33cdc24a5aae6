"""Results of evaluations, as JSON for programs and as tables for people."""

import datetime
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from tokenbridge_jax.runtime import storage

# Names of metrics in tables, with the better direction.
_TITLES = {
    "fid": "FID (lower)",
    "fd_dinov2": "FD_DINOv2 (lower)",
    "frechet_distance": "Frechet distance (lower)",
    "thumbnail_distance": "thumbnail distance (lower)",
    "sfid": "sFID (lower)",
    "inception_score": "IS, any order (higher)",
    "inception_score_std": "  standard deviation of splits",
    "inception_score_adm": "IS as ADM, in file order (higher)",
    "kid": "KID (lower)",
    "kid_std": "  standard deviation of subsets",
    "precision": "precision (higher)",
    "recall": "recall (higher)",
}


def machine() -> dict[str, Any]:
    """The versions, the devices and the date of a result."""
    try:
        version = metadata.version("tokenbridge_jax")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "tokenbridge_jax": version,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(
    path: epath.PathLike,
    metrics: Mapping[str, Any],
    facts: Mapping[str, Any],
    remarks: Sequence[str] = (),
) -> None:
    """Writes metrics, the facts they depend on, and remarks, completely or not at all."""
    result = {"metrics": metrics, "remarks": list(remarks), "facts": facts, "machine": machine()}
    storage.write_json(path, plain(result))


def plain(value: Any) -> Any:
    """Converts numpy's numbers and arrays for JSON; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def table(
    metrics: Mapping[str, float], facts: Mapping[str, Any], remarks: Sequence[str] = ()
) -> str:
    """The metrics, the facts they depend on, and the remarks, one per line."""
    lines = [f"{_TITLES.get(name, name):32}{value:>12.4f}" for name, value in metrics.items()]
    lines += [f"  {name.replace('_', ' '):28}{_short(value)}" for name, value in facts.items()]
    return "\n".join([*lines, *(f"note: {remark}" for remark in remarks)])


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table; floats have four decimals, None is a dash."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text
