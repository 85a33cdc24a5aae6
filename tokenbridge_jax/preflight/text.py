"""Formats a report as text, or several reports as a table in Markdown.

python -m tokenbridge_jax.preflight.text runs/preflight/TYPE_SIZE_*.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenbridge_jax.preflight.chips import GIB
from tokenbridge_jax.runtime.progress import format_seconds

Report = dict[str, Any]


def as_text(report: Report) -> str:
    """Formats a report for a reader."""
    memory, settings = report["memory"], report["settings"]
    device = "chip" if report["chips"] == report["devices"] else "device (half a chip)"
    lines = [
        f"{report['what']} on {report['topology']}: {report['chips']} chips, "
        f"{settings['batch'] / report['chips']:g} images a chip; {listed(settings)}",
        f"compiled in {report['compile_seconds']} s: {report['program']}",
        f"{'fits' if report['fits'] else 'DOES NOT FIT'}: {gib(memory['needed'])} of "
        f"{gib(memory['available'])} a {device}",
        *(
            f"  {name:20} {gib(size)}"
            for name, size in memory.items()
            if name not in ("available", "needed")
        ),
    ]
    if report["fits"]:
        lines += _time_lines(report, device)
    if "run" in report:
        lines.append(run_line(report["run"]))
    if report.get("suggestion"):
        lines += ["", f"These fit: {' '.join(report['suggestion']['flags'])}", ""]
        lines.append(as_text(report["suggestion"]))
    elif "suggestion" in report:
        lines.append("No settings were found that fit: use more chips, or a smaller batch")
    return "\n".join(lines)


def run_line(run: dict[str, Any]) -> str:
    """The length of the whole run, if it is known."""
    line = f"run: {run['steps']} steps for {run['images']} images ({run['whose_images']})"
    if "days" not in run:
        return line
    days, hours = run["days"], run["chip_hours"]
    length = f"{days:.1f} days" if days >= 1 else format_seconds(86400 * days)
    return f"{line}: {length}, {hours:,.{int(hours < 10)}f} chip-hours"


def _time_lines(report: Report, device: str) -> list[str]:
    done, seconds = report["a_device"], report["seconds"]
    model, mean = report["model_flops"] / report["devices"] / 1e12, seconds["mean_over_this"]
    return [
        f"a {device} does",
        f"  products             {done['product_flops'] / 1e12:.1f} TFLOP",
        f"  memory traffic       {done['memory_traffic'] / 1e9:.1f} GB",
        *(
            f"  {one['kind']:20} {one['bytes'] / 1e9:.2f} GB in {one['runs']} runs of "
            f"{one['count']} instructions among {one['group']}: sends {one['sent'] / 1e9:.2f} GB"
            for one in done["collectives"]
        ),
        "seconds",
        f"  products at peak     {seconds['products_at_peak']:.3f}",
        f"  memory traffic       {seconds['memory_traffic']:.3f}",
        f"  collectives          {seconds['collectives']:.3f}",
        f"  libtpu's estimate    {seconds['estimated_by_libtpu']:.3f}  with all collectives",
        f"  compiled schedule    {seconds['program']:.3f}",
        f"  expected             {seconds['expected']:.3f}  scaled by {mean:.3f} for the mean",
        f"  at best              {seconds['at_best']:.3f}",
        f"{report['images_per_second']:,.0f} images/s, {report['share_of_peak']:.1%} of peak "
        f"(the mathematics of a step has {model:.1f} TFLOP on average)",
        *(f"assumed: {assumption}" for assumption in report["assumptions"]),
    ]


def listed(settings: Report) -> str:
    """Formats settings on one line."""
    mesh = " ".join(f"{name}={size}" for name, size in settings["mesh"].items())
    rest = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "mesh")
    return f"{rest}, mesh {mesh}"


def gib(size: int | float) -> str:
    """Formats bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


COLUMNS = (
    "type, size", "topology", "chips", "images a chip", "settings", "GiB of those a chip has",
    "step, s", "share of peak", "chip-hours", "days",
)  # fmt: skip


def table(reports: dict[str, Report]) -> str:
    """Makes a table with one row for each report, which begins with its name."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(name, r) for name, r in reports.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, report: Report) -> list[str]:
    settings = report["settings"]
    chosen = f"fsdp {settings['mesh']['fsdp']}, remat {settings['remat']}, "
    chosen += f"head_chunk {settings['head_chunk']}"
    if settings["accumulation"] > 1:
        chosen += f", accumulation {settings['accumulation']}"
    row = [name, report["topology"], str(report["chips"])]
    row += [f"{settings['batch'] / report['chips']:g}", chosen]
    if "crashed" in report:
        return [*row, "", "libtpu crashed", "", "", ""]
    memory, run = report["memory"], report["run"]
    cores = report["devices"] // report["chips"]
    needed, available = (cores * memory[key] / GIB for key in ("needed", "available"))
    row.append(f"{needed:.1f} of {available:.1f}")
    if not report["fits"]:
        return [*row, "does not fit", "", "", ""]
    return [
        *row,
        f"{report['seconds']['expected']:.2f}",
        f"{report['share_of_peak']:.0%}",
        f"{run['chip_hours']:,.0f}",
        f"{run['days']:.1f}",
    ]


if __name__ == "__main__":
    paths = map(Path, sys.argv[1:])
    print(table({" ".join(p.stem.split("_")[:2]): json.loads(p.read_text()) for p in paths}))
