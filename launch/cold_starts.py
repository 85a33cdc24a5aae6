"""Measures the first and the second start of every command that computes, as a Markdown table.

  python launch/cold_starts.py --config digits
  python launch/cold_starts.py --workdir runs/quickstart
  python launch/cold_starts.py --config imagenet256:size=L --flag=--config.data.path=/data/imagenet

Every start is a process of its own. The first one finds an empty folder of compiled programs, the
second one what the first has left there; no other command uses that folder. The two write to
workdirs of their own, in a temporary folder that is removed at the end. Of `--workdir` only the
config is used. Seconds of CPU are those of the process and its children, user and system.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PICTURE = "PICTURE.png"  # Stands for a picture to edit.
TRAIN = ["train", "--config.training.steps=1", "--config.training.warmup_steps=0"]
AGAIN = ["train", "--config.training.steps=2", "--config.training.warmup_steps=0"]
# What the table calls a start, and its command. A line may need the files of those before it.
STARTS = {
    "train-vae, one update": [
        "train-vae", "--config.vae_training.steps=1", "--config.vae_training.warmup_steps=0",
    ],
    "tokenize": ["tokenize"],
    "train, one update": [
        *TRAIN, "--config.training.eval_every=0", "--config.training.sample_every=0",
    ],
    "train, one more, validation, sample grid": [
        *AGAIN, "--config.training.eval_every=2", "--config.training.sample_every=2",
    ],
    "sample, 1 image": ["sample", "--num_images=1"],
    "sample, 100 images": ["sample", "--num_images=100"],
    "edit, 1 image": ["edit", f"--input={PICTURE}", "--box=0,0.5,1,0.5"],
    "evaluate reconstruction, 64 images": ["evaluate", "reconstruction", "--num_images=64"],
    "evaluate likelihood, 64 images": ["evaluate", "likelihood", "--num_images=64"],
    "evaluate generation, 100 images": [
        "evaluate", "generation", "--num_images=100", "--reference=data", "--features=thumbnails",
    ],
    "demo, until the page shows an image": ["demo", "--port=0"],
}  # fmt: skip


class Seconds(NamedTuple):
    """What a start took."""

    clock: float
    cpu: float


def main() -> int:
    """Prints a line of the table after each command; returns how many commands failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="an experiment, as for the commands")
    which.add_argument("--workdir", type=Path, help="a run; its config is measured")
    parser.add_argument("--flag", action="append", default=[], help="for every command")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one start")
    args = parser.parse_args()
    if args.workdir and not (args.workdir / "config.json").is_file():
        parser.error(f"--workdir {args.workdir} has no config.json: name a run, or use --config")
    print(f"{machine()}, load {os.getloadavg()[0]:.1f} at the start.\n")
    print("| | cold: clock | CPU | warm: clock | CPU |\n|---|---|---|---|---|", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="cold-starts-") as name:
        folder = Path(name)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "picture.png")
        for workdir in (folder / "cold", folder / "warm"):
            workdir.mkdir()
            if args.workdir:
                shutil.copy(args.workdir / "config.json", workdir)
        for number, (title, command) in enumerate(STARTS.items()):
            flags = complete(command, args.config, args.flag, folder / "picture.png")
            measure = until_first_image if command[0] == "demo" else until_the_end
            try:
                cold, warm = (
                    measure(
                        [*flags, f"--workdir={folder / workdir}"],
                        environment(folder / "programs" / str(number)),
                        args.timeout,
                    )
                    for workdir in ("cold", "warm")
                )
                cells = [f"{value:.1f} s" for value in (*cold, *warm)]
            except RuntimeError as error:
                cells, failed = [f"failed: {error}", "", "", ""], failed + 1
            print(f"| {title} | {' | '.join(cells)} |", flush=True)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")
    return failed


def complete(command: list[str], config: str | None, flags: list[str], picture: Path) -> list[str]:
    """The command with a config, which stands before the flags that change it, and more flags."""
    words = [word for word in command if not word.startswith("--")]
    named = [f"--config={config}"] if config else []
    own = [flag.replace(PICTURE, str(picture)) for flag in command[len(words) :]]
    return [*words, *named, *own, *flags]


def machine() -> str:
    """The machine and the versions, in words."""
    code = "import jax; print(jax.device_count(), jax.devices()[0].device_kind)"
    devices = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    cores = len(os.sched_getaffinity(0))
    return (
        f"Devices: {devices.stdout.strip()}; {cores} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {', '.join(versions)}"
    )


def environment(cache: Path) -> dict[str, str]:
    """The environment of a command that keeps compiled programs in `cache`."""
    own = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return kept | {"XDG_CACHE_HOME": str(cache)}


@contextlib.contextmanager
def started(
    argv: list[str], environment: dict[str, str], timeout: float
) -> Iterator[subprocess.Popen]:
    """A command; it is stopped at the end, and when the time is over."""
    module = f"tokenbridge_jax.commands.{argv[0].replace('-', '_')}"
    with subprocess.Popen(
        [sys.executable, "-m", module, *argv[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.terminate()


def timed(run: Callable[[], float]) -> Seconds:
    """Runs a function that returns seconds by the clock; adds the CPU of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def until_the_end(argv: list[str], environment: dict[str, str], timeout: float) -> Seconds:
    """What a whole command takes.

    Raises:
      RuntimeError: it failed; with its last line.
    """

    def run() -> float:
        begin = time.perf_counter()
        with started(argv, environment, timeout) as process:
            out, _ = process.communicate()
            seconds = time.perf_counter() - begin
        if process.returncode:
            raise RuntimeError((out.strip().splitlines() or ["no output"])[-1])
        return seconds

    return timed(run)


def until_first_image(argv: list[str], environment: dict[str, str], timeout: float) -> Seconds:
    """What `demo` takes until a visitor, who asks at once, sees the first image.

    Raises:
      RuntimeError: the page did not open, or sent no image.
    """

    def run() -> float:
        begin = time.perf_counter()
        with started(argv, environment, timeout) as process:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line.strip())
                if "the page is at " in line:
                    address = line.split("the page is at ")[1].split()[0]
                    visit(address.rstrip("/"), timeout)
                    return time.perf_counter() - begin
        raise RuntimeError(lines[-1] if lines else "no output")

    return timed(run)


def visit(address: str, timeout: float) -> None:
    """Presses the page's button Generate, as its own JavaScript does, and waits for an image."""

    def opened(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{address}{path}", data, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=timeout)

    config = json.load(opened("/config"))
    parts = {part["id"]: part for part in config["components"]}
    button = next(key for key, part in parts.items() if part["props"].get("value") == "Generate")
    event = next(x for x in config["dependencies"] if [button, "click"] in x["targets"])
    values = [parts[key]["props"].get("value") for key in event["inputs"]]
    request = {"data": values, "fn_index": event["id"], "session_hash": "first", "event_data": None}
    queue = f"{config['api_prefix']}/queue"
    opened(f"{queue}/join", request | {"trigger_id": button}).read()
    for line in opened(f"{queue}/data?session_hash=first"):
        if b"/file=" in line:
            return
        if b"process_completed" in line:
            break
    raise RuntimeError("the page sent no image")


if __name__ == "__main__":
    sys.exit(main())
