"""Trains a tiny model that is killed again and again, and compares it with an undisturbed run.

  python tests/soak.py --kills=30

Each life of the job ends in one of these ways:

  start     kill -9 of all processes while they start
  all       kill -9 of all, after a random number of new steps
  writing   kill -9 of all while a checkpoint is being written
  one       kill -9 of one process; the others must end by themselves, with status 76
  term      SIGTERM to one process; all must save one step and end with status 75

The last life runs to the end. Status 0: every loss, gradient norm and validation equals that of the
undisturbed run, to the last bit.
"""

import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import conftest  # noqa: F401  (The settings of the tests.)
from absl import app, flags
from jobs import start_job
from token_shards import TRAINING, results, write_workdir

from tokenbridge_jax.runtime.processes import EXIT_LOST
from tokenbridge_jax.training.checkpoints import Checkpoints
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED
from tokenbridge_jax.training.metric_writer import read_metrics

WAYS = ("start", "all", "writing", "one", "term")

# Seconds without the heartbeat of a lost process after which the others end.
HEARTBEAT_SECONDS = 10
# Longer than any life takes, even on a busy machine.
LIMIT_SECONDS = 300
WHOLE_RUN_SECONDS = 3600

CONFIG = TRAINING | {
    "model.dropout": 0.1,
    "training.eval_every": 7,
    "training.sample_every": 0,
    "training.keep": 2,
}


def start(workdir: Path, processes: int, log: Path, **config: object) -> list[subprocess.Popen]:
    """Starts a training job on four devices; its output is appended to `log`.

    Programs are always compiled: on CPUs only process 0 finds those on disk, and if the others
    compile for more than 30 seconds meanwhile, Gloo stops.
    """
    command = ["-m", "tokenbridge_jax.commands.train", "--distributed", "--workdir", workdir]
    command += [f"--config.{name}={value}" for name, value in (CONFIG | config).items()]
    with log.open("a") as stream:
        return start_job(
            command,
            [[]] * processes,
            devices=4 // processes,
            output=stream,
            JAX_ENABLE_COMPILATION_CACHE="false",
            TOKENBRIDGE_HEARTBEAT_SECONDS=str(HEARTBEAT_SECONDS),
        )


def end(job: Sequence[subprocess.Popen], seconds: int = LIMIT_SECONDS) -> list[int]:
    """Waits for all processes, for at most `seconds` each; returns their exit statuses."""
    try:
        return [process.wait(seconds) for process in job]
    except subprocess.TimeoutExpired:
        kill(job)
        raise


def kill(job: Sequence[subprocess.Popen]) -> None:
    """kill -9 of all processes."""
    for process in job:
        process.kill()


def steps_done(workdir: Path) -> int:
    """The last step in `metrics.jsonl`."""
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def saved(workdir: Path) -> int:
    """Number of updates at the latest complete checkpoint."""
    return Checkpoints(workdir / "checkpoints").latest or 0


def unfinished(workdir: Path) -> set[Path]:
    """Folders of unfinished checkpoints."""
    return set((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def wait_until(job: Sequence[subprocess.Popen], happened: Callable[[], bool]) -> bool:
    """Whether it happened before a process of the job ended."""
    limit = time.monotonic() + LIMIT_SECONDS
    while all(process.poll() is None for process in job):
        if happened():
            return True
        if time.monotonic() > limit:
            kill(job)
            raise TimeoutError("the job neither continues nor ends")
        time.sleep(0.01)
    return False


def one_life(
    way: str, job: Sequence[subprocess.Popen], workdir: Path, rng: random.Random
) -> list[int]:
    """Ends the job in this way; returns the exit statuses, all 0 if the job was done before."""
    left, goal = unfinished(workdir), steps_done(workdir) + rng.randrange(1, 12)
    if way == "start":
        time.sleep(rng.uniform(0, 10))
    elif way == "writing":
        wait_until(job, lambda: not unfinished(workdir) <= left)
        time.sleep(rng.uniform(0, 0.03))
    else:
        wait_until(job, lambda: steps_done(workdir) >= goal)
    chosen = rng.choice(job)
    if way == "term":
        chosen.send_signal(signal.SIGTERM)
    else:
        kill([chosen] if way == "one" else job)
    return end(job)


def check_life(way: str, statuses: Sequence[int], before: int, workdir: Path) -> str | None:
    """What is wrong after a life, if anything is."""
    causes = {"term": {EXIT_INTERRUPTED}, "one": {EXIT_LOST, -signal.SIGKILL}}
    allowed = causes.get(way, {-signal.SIGKILL}) | {0}
    if not set(statuses) <= allowed or (way == "term" and len(set(statuses)) > 1):
        return f"statuses {statuses}"
    if saved(workdir) < before:
        return f"checkpoint {before} is gone"
    return None


def lives(ways: Sequence[str], workdir: Path, rng: random.Random, **job: object) -> Iterator[str]:
    """Ends a run in each of these ways and then lets it finish; yields what was wrong."""
    counts: Counter[str] = Counter()
    for number, way in enumerate(ways):
        before = saved(workdir)
        begun = time.monotonic()
        statuses = one_life(way, start(workdir, **job), workdir, rng)
        after = f"{saved(workdir)} saved, {steps_done(workdir)} done"
        seconds = time.monotonic() - begun
        print(f"life {number}: {way} -> {statuses}, {after}, {seconds:.0f} s", flush=True)
        counts[way] += 1
        if wrong := check_life(way, statuses, before, workdir):
            yield f"life {number} ({way}): {wrong}"
        if statuses == [0] * len(statuses):
            yield f"the run was done after life {number} of {len(ways)}: give it more --steps"
            break
    if statuses := [s for s in end(start(workdir, **job), WHOLE_RUN_SECONDS) if s]:
        yield f"the last life ended with {statuses}"
    print(f"{sum(counts.values())} deaths: {dict(counts)}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs both and compares their metrics."""
    del argv
    args = flags.FLAGS
    folder = Path(args.folder or tempfile.mkdtemp(prefix="soak"))
    rng = random.Random(args.seed)
    config = {"training.steps": args.steps, "training.checkpoint_every": 5}
    job = {"processes": args.processes, "log": folder / "log.txt", **config}
    write_workdir(folder / "killed")
    shutil.copytree(folder / "killed", folder / "alone")
    wrong = list(lives(rng.choices(WAYS, k=args.kills), folder / "killed", rng, **job))
    if statuses := [s for s in end(start(folder / "alone", **job), WHOLE_RUN_SECONDS) if s]:
        wrong.append(f"the undisturbed run ended with {statuses}")
    ours, theirs = results(folder / "killed"), results(folder / "alone")
    if ours != theirs:
        wrong.append(f"{sum(a != b for a, b in zip(ours, theirs, strict=False))} lines differ")
    print("\n".join(wrong) or f"all {len(theirs)} lines of metrics are equal", flush=True)
    print(f"all files are in {folder}")
    return bool(wrong)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 30, "Number of lives that are ended early.", lower_bound=0)
    flags.DEFINE_integer("processes", 2, "Processes of the job, on four devices.", lower_bound=1)
    flags.DEFINE_integer("steps", 600, "Updates of the whole run.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed for the ways and times of ends.")
    flags.DEFINE_string("folder", None, "Folder for all files; a temporary one by default.")
    app.run(main)
