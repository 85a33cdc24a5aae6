"""Lines for the user on stderr, and a line that shows the progress of long work."""

import sys
import time
from typing import Any

import jax


def say(text: str) -> None:
    """Prints a line for the user to stderr; of several processes, only the first prints."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Formats a duration: `42s`, `3m05s`, `2h07m`, `4d03h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_rate(rate: float, unit: str) -> str:
    """Formats a rate a second, by the first of s, min and h in which it is at least 1."""
    if rate >= 1 or not rate:
        return f"{rate:.1f} {unit}/s"
    if rate * 60 >= 1:
        return f"{rate * 60:.1f} {unit}/min"
    return f"{rate * 3600:.1f} {unit}/h"


class Progress:
    """Prints `desc done/total rate eta` and the fields given, at most every `every_seconds`.

    On a terminal the line is rewritten in place; a log file gets a new line for each report. The
    rate is the mean since construction, and does not count the initial `done`. (tqdm fills a log
    file with carriage returns, and clu's `ReportProgress` imports TensorFlow.)
    """

    def __init__(
        self,
        total: int,
        unit: str = "img",
        desc: str = "",
        *,
        done: int = 0,
        scale: int = 1,
        every_seconds: float | None = None,
        visible: bool = True,
    ):
        """`scale` is the number of units in a count, such as images in a step."""
        self._total, self._unit, self._desc = total, unit, desc
        self._start_count = self._done = done
        self._scale, self._visible = scale, visible
        self._stream = sys.stderr
        self._live = self._stream.isatty()
        self._every = every_seconds if every_seconds is not None else (0.2 if self._live else 10.0)
        self._start = self._last_print = time.monotonic()
        self._fields: dict[str, Any] = {}
        self._printed: int | None = None

    @property
    def rate(self) -> float:
        """Units per second since construction."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return (self._done - self._start_count) * self._scale / elapsed

    @property
    def elapsed(self) -> float:
        """Seconds since construction."""
        return time.monotonic() - self._start

    def update(self, count: int = 1, **fields: Any) -> None:
        """Adds `count` to the work done; `fields` stay at the end of the line until replaced."""
        self._done += count
        self._fields.update(fields)
        if time.monotonic() - self._last_print >= self._every:
            self._print()

    def note(self, text: str) -> None:
        """Prints a line of its own, above the progress line on a terminal."""
        self._stream.write(f"\r\033[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Prints the final state, unless it is printed already."""
        if self._printed != self._done:
            self._print()
        if self._live and self._visible:
            self._stream.write("\n")
            self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _print(self) -> None:
        self._last_print, self._printed = time.monotonic(), self._done
        if not self._visible:
            return
        remaining = (self._total - self._done) * self._scale
        eta = format_seconds(remaining / self.rate) if self.rate else "?"
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        parts = [f"{self._desc} {self._done}/{self._total}{share}"]
        parts.append(format_rate(self.rate, self._unit))
        parts.append(f"took {format_seconds(self.elapsed)}" if remaining <= 0 else f"eta {eta}")
        for name, value in self._fields.items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        line = "  ".join(parts)
        self._stream.write(f"\r\033[K{line}" if self._live else f"{line}\n")
        self._stream.flush()
