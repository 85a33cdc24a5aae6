"""Runs launch/cifar10.sh with `quick` on class folders, also with kill -9 in every stage.

  python tests/cifar10_quick.py /data/cifar10 [--config.section.key=value ...]

The folders must have at least 1,100 training and 1,000 test pictures, which KID needs.

The line runs once undisturbed, and is then started again, which must change no file but the page.
In another workdir it is killed in the middle of each stage and started again until it is done.
Status 0: all starts that were not killed ended with 0, the page and its pictures exist, and the
figures of all three are finite and the same.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 3600
SETS = ("test", "reconstructions", "samples")
KEYS = {
    *(f"{part}_{key}" for part in SETS for key in ("frechet_distance", "kid", "accuracy")),
    *(f"{part}_{key}" for part in SETS for key in ("precision", "recall")),
    *("pictures", "train_pictures", "psnr", "val_nll_bits_per_index", "seconds"),
}


def middles(workdir: Path) -> dict[str, Callable[[], bool]]:
    """Stage -> whether it is in its middle; a stage that leaves no files yet has begun."""
    return {
        "1/5": lambda: any((workdir / "autoencoder/training/checkpoints").glob("[0-9]*")),
        "2/5": lambda: any((workdir / "tokens").glob("*.array_record")),
        "3/5": lambda: any((workdir / "checkpoints").glob("[0-9]*")),
        "4/5": lambda: True,
        "5/5": lambda: (workdir / "scores" / "test.npz").exists(),
    }


def start(arguments: Sequence[str], workdir: Path, log: Path) -> subprocess.Popen:
    """Starts the line in this environment, in a process group of its own.

    Args:
      arguments: the folder of pictures, then flags that change the config.
      workdir: of the line.
      log: gets the output.
    """
    data, *flags = arguments
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / "launch/cifar10.sh"), data, str(workdir), "quick"]
    with log.open("w") as stream:
        return subprocess.Popen(
            [*command, *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, log: Path) -> dict[str, float]:
    """Waits for the line, prints its stages, and returns the figures of its last line."""
    status = process.wait(LIMIT_SECONDS)
    text = log.read_text()
    if status:
        raise SystemExit(f"status {status}; the end of {log}:\n{text[-2000:]}")
    for line in re.findall(r"^== .*", text, re.MULTILINE):
        print(f"  {line}", flush=True)
    print(text.splitlines()[-1], flush=True)
    return json.loads(text.splitlines()[-1])


def kill_in(stage: str, arguments: Sequence[str], workdir: Path, log: Path) -> None:
    """Starts the line and kills all its processes in the middle of a stage."""
    process = start(arguments, workdir, log)
    is_there, limit = middles(workdir)[stage], time.monotonic() + LIMIT_SECONDS
    while f"== {stage} " not in log.read_text() or not is_there():
        if process.poll() is not None or time.monotonic() > limit:
            raise SystemExit(f"stage {stage} was not reached; see {log}")
        time.sleep(0.1)
    if stage == "4/5":
        time.sleep(10)  # The samples are written at once, at the end.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed in stage {stage}", flush=True)


def check(workdir: Path, figures: dict[str, float]) -> list[str]:
    """What is wrong with the outcome of a line."""
    wrong = [f"{name} is missing" for name in sorted(KEYS - figures.keys())]
    wrong += [f"{name} is {x}" for name, x in figures.items() if not math.isfinite(x)]
    page = workdir / "index.html"
    shown = re.findall(r'src="([^"]*)"', page.read_text())
    wrong += [f"{name} is not there" for name in shown if not (workdir / name).is_file()]
    return wrong if len(shown) >= 14 else [*wrong, f"{page} shows {len(shown)} pictures"]


def contents(workdir: Path) -> dict[str, int]:
    """Times of all files that a second start must not write again.

    `tokenize` always writes the description of the shards, with the same content.
    """
    parts = ("autoencoder", "tokens", "checkpoints", "samples", "scores")
    files = (file for part in parts for file in (workdir / part).rglob("*") if file.is_file())
    return {str(file): file.stat().st_mtime_ns for file in files if file.name != "dataset.json"}


def main() -> int:
    """Runs all starts and prints what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="has train/CLASS/ and test/CLASS/")
    parser.add_argument("--folder", type=Path, help="for all files; a temporary one by default")
    args, flags = parser.parse_known_args()
    line = [args.data, *flags]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="cifar10"))
    folder.mkdir(parents=True, exist_ok=True)
    alone, killed, log = folder / "alone", folder / "killed", folder / "log.txt"

    print("undisturbed", flush=True)
    first = finish(start(line, alone, log), log)
    wrong = check(alone, first)
    before = contents(alone)
    print("started again", flush=True)
    second = finish(start(line, alone, log), log)
    after = contents(alone)
    wrong += [f"{name} was written again" for name in before if after.get(name) != before[name]]
    for stage in middles(killed):
        kill_in(stage, line, killed, log)
    print("after the last kill", flush=True)
    third = finish(start(line, killed, log), log)
    wrong += check(killed, third)
    for name in sorted(KEYS - {"seconds"}):
        values = {figures.get(name) for figures in (first, second, third)}
        if len(values) > 1:
            wrong.append(f"{name} differs: {values}")
    print("\n".join(wrong) or "all is as it should be", flush=True)
    print(f"all files are in {folder}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
