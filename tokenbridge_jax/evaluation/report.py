"""What an evaluation found, as JSON for programs and a table for people."""

import datetime
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from tokenbridge_jax.runtime import storage

# Names of metrics as people write them, with the direction that is better.
_TITLES = {
    "fid": "FID (lower)",
    "thumbnail_distance": "distance of thumbnails (lower)",
    "sfid": "sFID (lower)",
    "inception_score": "IS, any order (higher)",
    "inception_score_std": "  standard deviation of splits",
    "inception_score_adm": "IS as ADM, of neighbours (higher)",
    "kid": "KID (lower)",
    "kid_std": "  standard deviation of subsets",
    "precision": "precision (higher)",
    "recall": "recall (higher)",
}


def machine() -> dict[str, Any]:
    """What computed it."""
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
    """Writes a result, whole or not at all: `metrics`, `facts` they depend on, `remarks`."""
    storage.write_json(
        path,
        plain({"metrics": metrics, "remarks": list(remarks), "facts": facts, "machine": machine()}),
    )


def plain(value: Any) -> Any:
    """Numpy's numbers and arrays as JSON has them; what is not finite becomes null."""
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
    """The numbers, then what they depend on, then what to know of them; a line each."""
    rows = [(_TITLES.get(name, name), f"{value:.4f}") for name, value in metrics.items()]
    lines = [f"{name:32}{value:>12}" for name, value in rows]
    for name, value in facts.items():
        lines.append(f"  {name.replace('_', ' '):28}{_short(value)}")
    lines += [f"note: {remark}" for remark in remarks]
    return "\n".join(lines)


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table; a number has four decimals, what is missing a dash."""
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
