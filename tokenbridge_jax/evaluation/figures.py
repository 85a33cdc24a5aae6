"""Shared parts of the evaluations' plots. Matplotlib is imported only when one is drawn."""

import io as bytes_io
from typing import Any

from etils import epath

from tokenbridge_jax.runtime import storage

# Colours that colour-blind people can distinguish (Okabe & Ito, 2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#808080"


def make_axes(
    count: int = 1, width: float = 5.0, height: float = 3.6, columns: int | None = None
) -> list[Any]:
    """Makes a new figure.

    Args:
      count: number of axes.
      width: of each, in inches.
      height: of each, in inches.
      columns: axes in a row; by default all are side by side.
    """
    from matplotlib.figure import Figure

    columns = min(columns or count, count)
    rows = -(-count // columns)
    figure = Figure((columns * width, rows * height), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
    return list(axes[:count])


def matrix(ax: Any, values: Any, label: str, *, smallest: float | None = None) -> None:
    """Draws a matrix as an image with a colour bar."""
    ax.grid(False)
    ax.spines[["top", "right"]].set_visible(True)
    shown = ax.imshow(values, cmap="viridis", vmin=smallest, interpolation="nearest")
    ax.figure.colorbar(shown, ax=ax, label=label, shrink=0.9)


def save(ax: Any, path: epath.PathLike) -> epath.Path:
    """Writes the figure of the axes as PNG, completely or not at all."""
    buffer = bytes_io.BytesIO()
    ax.figure.savefig(buffer, format="png")
    storage.write_bytes(path, buffer.getvalue())
    return epath.Path(path)
