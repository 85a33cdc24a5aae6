"""The profile of a TPU program as tables and a picture."""

import collections
import dataclasses
from collections.abc import Callable, Iterable

from etils import epath

from tokenbridge_jax.benchmark.profiles import place
from tokenbridge_jax.evaluation import figures
from tokenbridge_jax.preflight.profile import Operation
from tokenbridge_jax.runtime import storage

COLOURS = {"bundles": figures.BLUE, "HBM": figures.ORANGE, "ICI": figures.RED}

# Modules in the picture, and in the tables at least this share of the step.
_BARS = 25
_SMALLEST_SHARE = 1e-4

_HEAD = """\
{title}
{total:.2f} ms a run on one device: {split}.

bound    what takes the time: bundles (the instructions of a core, one bundle a cycle), HBM (bytes
         that are read and written), ICI (waits for other chips)
Mcycles  millions of cycles of the bundles; a matrix unit's products count at its peak at least
GB       bytes that are read from HBM and written to it
unit     the unit that the bundles use most, and the share of its slots: MXU (products), VALU
         (arithmetic), XLU (transposes, reductions over lanes), EUP (exp and others), VLOAD, VSTORE
spill    the share of the slots for stores that saves registers
?        cycles that depend on data: every loop of them counts once

"""


@dataclasses.dataclass(frozen=True)
class Row:
    """Operations that belong together.

    Attributes:
      name: of the module or the operation.
      seconds: by what bounds them.
      cycles, hbm_bytes, runs, guessed: as an operation's, together.
      busy: unit -> share of its slots, over all cycles.
    """

    name: str
    seconds: dict[str, float]
    cycles: int
    hbm_bytes: int
    runs: int
    guessed: bool
    busy: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        return max(self.seconds, key=self.seconds.__getitem__)


def rows(operations: Iterable[Operation], name: Callable[[Operation], str]) -> list[Row]:
    """Operations put together by a name, the slowest first."""
    groups = collections.defaultdict[str, list[Operation]](list)
    for operation in operations:
        groups[name(operation)].append(operation)
    return sorted((_row(*group) for group in groups.items()), key=lambda row: -row.total)


def _row(name: str, group: list[Operation]) -> Row:
    seconds, busy = collections.Counter[str](), collections.Counter[str]()
    for one in group:
        seconds[one.bound] += one.seconds  # type: ignore[assignment]
        busy.update({unit: share * one.cycles for unit, share in one.busy.items()})
    cycles = sum(one.cycles for one in group)
    return Row(
        name,
        dict(seconds),
        cycles,
        sum(one.hbm_bytes for one in group),
        sum(one.runs for one in group),
        any(one.guessed for one in group),
        {unit: used / max(cycles, 1) for unit, used in busy.items()},
    )


def module(operation: Operation) -> str:
    """The module that an operation comes from; what the compiler added has none."""
    return place(operation.source) or "(added by the compiler)"


def write_profile(operations: list[Operation], title: str, folder: epath.PathLike) -> None:
    """Writes `profile.txt` (tables by module and by operation) and `profile.png`."""
    folder = storage.as_path(folder)
    modules = rows(operations, module)
    together = rows(operations, lambda _: "total")
    total = together[0].total
    split = ", ".join(
        f"{seconds / total:.0%} {bound}" for bound, seconds in sorted(together[0].seconds.items())
    )
    head = _HEAD.format(title=title, total=total * 1e3, split=split)
    by_operation = rows(operations, lambda one: f"{one.name:44} {one.source}")
    tables = [
        _table("module", [*modules, *together], total),
        _table("operation", by_operation, total),
    ]
    storage.write_bytes(folder / "profile.txt", (head + "\n".join(tables)).encode())
    _draw(modules[:_BARS], total, title, folder / "profile.png")


def _table(title: str, rows: list[Row], total: float) -> str:
    lines = [
        f"{'ms':>9} {'share':>6} {'bound':>8} {'Mcycles':>8} {'GB':>7} {'unit':>10} {'spill':>5} "
        f"{'runs':>6}   {title}"
    ]
    for row in rows:
        if row.total < _SMALLEST_SHARE * total:
            continue
        units = {unit: share for unit, share in row.busy.items() if ":" not in unit}
        unit = max(units, key=units.__getitem__, default="")
        fullest = f"{unit} {units[unit]:.0%}" if row.cycles else ""
        spill = f"{row.busy['VSTORE:SPILL']:.0%}" if row.cycles else ""
        lines.append(
            f"{row.total * 1e3:9.3f} {row.total / total:6.1%} {row.bound:>8} "
            f"{row.cycles / 1e6:8.2f} {row.hbm_bytes / 1e9:7.2f} {fullest:>10} {spill:>5} "
            f"{row.runs:6} {'?' if row.guessed else ' '} {row.name}"
        )
    return "\n".join(lines) + "\n"


def _draw(modules: list[Row], total: float, title: str, path: epath.Path) -> None:
    (ax,) = figures.make_axes(width=11.0, height=1.2 + 0.26 * len(modules))
    names = [row.name for row in modules]
    left = [0.0] * len(modules)
    for bound, colour in COLOURS.items():
        widths = [row.seconds.get(bound, 0.0) * 1e3 for row in modules]
        ax.barh(names, widths, left=left, color=colour, label=bound, height=0.75)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for number, row in enumerate(modules):
        ax.annotate(f" {row.total / total:.1%}", (left[number], number), va="center", fontsize=7)
    ax.invert_yaxis()
    ax.tick_params("y", labelsize=7)
    ax.set(xlabel=f"milliseconds of {total * 1e3:.0f}", title=title)
    ax.legend(title="bound by", loc="lower right", fontsize=8)
    figures.save(ax, path)
