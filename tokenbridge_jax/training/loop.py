"""The training loop, shared by the autoencoder and the model.

The host reads metrics one update late, so that the device never waits for the host. A checkpoint is
written only when all losses before it are known to be finite. A run that was stopped at any point
continues exactly as if it had not been stopped.

Parameters, data order, views, masks, noise and dropout depend on the seed, the update and an
image's place in the global batch, never on devices or processes. A job on the same number of
devices and processes, with the same mesh, repeats bit for bit, stopped or not. On GPUs this needs
the same compiled programs (`runtime/compilation_cache.py`), because XLA picks algorithms by timing
them whenever it compiles; and the gradients of the autoencoder's convolutions need a flag of XLA's
(docs/training.md). Any other number or mesh, and other programs, change only the order of sums:
losses agree to the rounding of the compute dtype, a difference that grows during training, and
samples are the same images except where rounding moves a draw across the border between two levels.
"""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NoReturn

import jax
from clu import parameter_overview  # Only this: clu's writers and actions import TensorFlow.
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tokenbridge_jax.runtime import hardware, meshes, processes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress, say
from tokenbridge_jax.training.checkpoints import Checkpoints, run_record
from tokenbridge_jax.training.metric_writer import MetricWriter, read_metrics
from tokenbridge_jax.training.program import Program, Recipe
from tokenbridge_jax.training.state import TrainState, create_state
from tokenbridge_jax.training.step import Task

# Exit status of a command that was told to stop, and continues when it is started again.
# (EX_TEMPFAIL of sysexits.h: "try again later".)
EXIT_INTERRUPTED = 75


class Interrupted(Exception):
    """The run was told to stop (SIGTERM, SIGINT, a preemption) and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Hook:
    """A part of a run that is not training, such as a validation pass or a sample grid.

    Attributes:
      every: updates between two calls; there is a call after the last update, too. 0 is never.
      run: takes the state, the number of updates done and the writer (for pictures); returns
        numbers for that step's line of `metrics.jsonl`.
    """

    every: int
    run: Callable[[TrainState, int, MetricWriter], Mapping[str, float]]

    def is_due(self, step: int, total: int) -> bool:
        """Whether to run after `step` updates of `total`."""
        return bool(self.every) and (step % self.every == 0 or step == total)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: everything that the loop needs to know.

    Attributes:
      name: the first word of the progress line.
      directory: gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
      task: what to train.
      recipe: how to train it.
      seed: for parameters, random choices of examples, and dropout.
      batches: number of updates done -> iterator over this process's share of the batches that
        follow, trees of numpy arrays.
      flops_per_image: matmul FLOPs of training on one image.
      fields: JSON that describes the run; saved with every checkpoint.
      fixed: names of the fields that must be equal when a run is resumed.
      draw: number of updates done -> what the host decides for the next one, numpy scalars.
      begin: called once the run is known to be possible, before its first update.
      hooks: see `Hook`.
      redrawn: names of parameters that start at random if those of step 0 have another shape.
    """

    name: str
    directory: epath.Path
    task: Task
    recipe: Recipe
    seed: int
    batches: Callable[[int], Iterator[Any]]
    flops_per_image: float
    fields: Mapping[str, Any]
    fixed: Collection[str]
    draw: Callable[[int], Any] = lambda step: None
    begin: Callable[[], None] = lambda: None
    hooks: Sequence[Hook] = ()
    redrawn: Collection[str] = ()

    @property
    def total_steps(self) -> int:
        """Updates in the whole run."""
        return self.recipe.optimizer.total_steps


def fit(run: Run, mesh: Mesh, program: Program | None = None) -> TrainState:
    """Trains to the end of `run`, from its latest checkpoint if there is one.

    A checkpoint of step 0 replaces the random initial state, for example by imported parameters.

    Args:
      run: the run.
      mesh: the devices.
      program: `Program.make` for this run and mesh, if it has been made already.

    Returns:
      The final state, which is also the latest checkpoint. If the run is finished, it is loaded.

    Raises:
      Interrupted: the run was told to stop; the state is saved.
      UserError: a loss was not finite (nothing after the last good checkpoint is kept), the disk is
        full, the checkpoints belong to another run, or they are lost while the metrics are not.
    """
    recipe, total = run.recipe, run.total_steps
    program = program or Program.make(run.task, recipe, run.seed, mesh)
    optimizer, abstract = program.optimizer, program.abstract

    with contextlib.ExitStack() as stack:
        stack.enter_context(meshes.use_mesh(mesh))
        checkpoints = Checkpoints(run.directory / "checkpoints", recipe.keep, recipe.keep_every)
        stack.callback(checkpoints.close)
        latest = _agree_on_latest(checkpoints)
        start = latest or 0
        for step in checkpoints.incomplete:
            say(f"{run.name}: checkpoint {step} is incomplete: continuing from step {start}")
        if not start:
            _check_nothing_lost(run, checkpoints)
        stored = None
        if latest is not None:
            _check_same_run(run_record(checkpoints.directory, start), run, checkpoints.directory)
            stored = checkpoints.restore(abstract, start, any_shape=() if start else run.redrawn)
            say(f"{run.name}: continues from step {start} of {total} ({checkpoints.directory})")
        state = create_state(run.task.init, optimizer, abstract, run.seed, stored)
        if start >= total:
            say(f"{run.name}: all {total} steps are done; nothing left to train")
            return state
        batches = run.batches(start)
        run.begin()
        checkpoints.open()
        _describe_parameters(run, state)

        writer = MetricWriter(run.directory, start)
        stack.callback(writer.close)
        is_told_to_stop = stack.enter_context(_interruptions())
        stack.callback(program.cancel)
        report = _Report(run, writer, checkpoints)
        stack.callback(report.close)

        def save(state: TrainState, step: int) -> None:
            writer.flush()
            checkpoints.save(state, step, dict(run.fields))

        def stop_at(step: int) -> NoReturn:
            checkpoints.wait()
            say(f"{run.name}: stopped and saved at step {step}; the same command continues")
            raise Interrupted

        for step in range(start + 1, total + 1):
            batch, draw = meshes.to_global((next(batches), run.draw(step - 1)), mesh)
            if step == start + 1:
                say(f"{run.name}: the first update begins; its program is compiled if it is new")
                program.compile_ahead(batch, map(run.draw, range(start, total)))
            if (compiling := program.compiling(draw)) is not None:
                report.wait(compiling, functools.partial(is_told_to_stop, step))
                if is_told_to_stop(step):
                    checkpoints.wait()
                    if checkpoints.latest != step - 1:
                        save(state, step - 1)
                    stop_at(step - 1)
            # An implicit copy between host and devices, which would delay them, is an error here.
            with jax.transfer_guard("disallow"):
                state, metrics = program.run(state, batch, draw)
                # Update `step` runs on the device while the host looks at the one before it.
                report.settle()
            report.expect(step, metrics)

            stop = is_told_to_stop(step) and step < total
            hooks = [hook for hook in run.hooks if hook.is_due(step, total)]
            saves = stop or step == total or step % recipe.checkpoint_every == 0
            if hooks or saves:
                report.check()
                with report.pause():
                    found: dict[str, float] = {}
                    for hook in hooks:
                        found |= hook.run(state, step, writer)
                    report.settle(found if hooks else None)
                    if saves:
                        save(state, step)
            if stop:
                stop_at(step)
        checkpoints.wait()
        return state


class _Report:
    """Checks that the metrics of each update are finite, and measures its speed."""

    def __init__(self, run: Run, writer: MetricWriter, checkpoints: Checkpoints):
        self._run, self._writer, self._checkpoints = run, writer, checkpoints
        self._step = 0
        self._metrics: Mapping[str, jax.Array] | None = None
        self._values: dict[str, float] = {}
        self._progress: Progress | None = None
        # Step and time from which speed is measured, and when the last update was seen to end.
        self._since: tuple[int, float] | None = None
        self._seen = 0.0
        peak, source = hardware.peak_flops(jax.local_devices()[0])
        self._peak = peak * jax.device_count()
        say(f"{run.name}: peak {self._peak / 1e12:.3g} TFLOP/s ({source}) x {jax.device_count()}")

    def expect(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of an update that may still be running on the device."""
        self._step, self._metrics, self._values = step, metrics, {}

    def check(self) -> None:
        """Waits for the update and checks its numbers.

        Raises:
          UserError: the loss or the gradient is not finite.
        """
        if self._metrics is None or self._values:
            return
        values = {name: float(value) for name, value in jax.device_get(self._metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                self._checkpoints.wait()
                directory, latest = self._checkpoints.directory, self._checkpoints.latest
                kept = f"the last good checkpoint is step {latest} in {directory}"
                raise UserError(
                    f"{name} is {values[name]} at step {self._step}: stopped; "
                    f"{kept if latest else 'no checkpoint had been written yet'}; "
                    "lower the learning rate or look at the data before you continue"
                )
        self._values, self._seen = values, time.perf_counter()
        self._show_progress()

    def settle(self, found: dict[str, float] | None = None) -> None:
        """Checks the update if necessary, and writes its line if one is due.

        Args:
          found: the numbers of hooks, for which a line is always due; None if no hook has run.
        """
        self.check()
        recipe, at_end = self._run.recipe, self._step == self._run.total_steps
        is_due = self._step % recipe.log_every == 0 or found is not None or at_end
        if self._metrics is not None and is_due:
            self._writer.write(self._step, self._values | (found or {}) | self._speed())
            self._since = (self._step, self._seen)
        self._metrics, self._values = None, {}

    def wait(self, compiling: futures.Future[Any], stop: Callable[[], bool]) -> None:
        """Waits for the program of the next update, or a stop, after a look at the last one."""
        self.settle()
        assert self._progress is not None  # An update is done.
        done = f"{self._run.name}: update {self._step} is done"
        self._progress.note(f"{done}; the next one waits until its program is compiled")
        with self.pause():
            while not (stop() or futures.wait([compiling], timeout=0.5).done):
                pass

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent inside, after `check`, from the training speed."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            step, since = self._since
            self._since = step, since + time.perf_counter() - start

    def close(self) -> None:
        """Ends the progress line."""
        if self._progress is not None:
            self._progress.close()

    def _show_progress(self) -> None:
        if self._progress is None:  # Counts from the first update: compiling is not training.
            batch_size = self._run.recipe.batch_size
            self._progress = Progress(
                self._run.total_steps,
                desc=self._run.name,
                done=self._step,
                scale=batch_size,
                visible=jax.process_index() == 0,
            )
            self._since = (self._step, self._seen)
            return
        share = self._speed()["share_of_peak"]
        self._progress.update(1, loss=self._values["loss"], MFU=f"{share:.1%}")

    def _speed(self) -> dict[str, float]:
        """Images per second since the last line, and the share of the peak that this is."""
        if self._since is None or self._step == self._since[0]:
            return {}
        images = (self._step - self._since[0]) * self._run.recipe.batch_size
        rate = images / (self._seen - self._since[1])
        return {
            "images_per_second": rate,
            "share_of_peak": rate * self._run.flops_per_image / self._peak,
        }


@contextlib.contextmanager
def _interruptions() -> Iterator[Callable[[int], bool]]:
    """Yields a function: whether to stop after update `step`, the same answer on every process.

    SIGTERM or SIGINT asks for a stop; a second one ends the run without it. With several processes,
    SIGTERM to one is enough: the coordination service tells all of them, and chooses the update to
    stop at.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        restore()
        # Unlike print, this may interrupt another write.
        os.write(2, b"\nstops after this update; a second signal stops at once, without saving\n")

    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is threading.main_thread():
        previous = {s: signal.signal(s, receive) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(received)
    finally:
        restore()


def _describe_parameters(run: Run, state: TrainState) -> None:
    """Says how many parameters there are, and writes shape and sharding of each to a file."""
    path = run.directory / "parameters.txt"
    table = parameter_overview.get_parameter_overview(state.params, include_stats="sharding")
    if jax.process_index() == 0:
        storage.write_bytes(path, f"{table}\n".encode())
    say(f"{run.name}: {parameter_overview.count_parameters(state.params):,} parameters ({path})")


def _agree_on_latest(checkpoints: Checkpoints) -> int | None:
    """The latest checkpoint, if there is one; all processes must find the same."""
    latest = checkpoints.latest
    found = processes.gather("none" if latest is None else str(latest))
    if len(set(found)) > 1:
        raise UserError(
            f"the processes find different latest checkpoints in {checkpoints.directory}: "
            f"{', '.join(found)}; give all of them the same shared --workdir"
        )
    return latest


def _check_nothing_lost(run: Run, checkpoints: Checkpoints) -> None:
    """Refuses to start again, which would erase the metrics, if a run's checkpoints are lost.

    A run that was killed before its first checkpoint was complete may start again. It has at most
    `2 * checkpoint_every` lines, because the second checkpoint waits for the first one.
    """
    metrics = run.directory / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    if rows and rows[-1]["step"] > 2 * run.recipe.checkpoint_every:
        raise UserError(
            f"{metrics} ends at step {rows[-1]['step']} but {checkpoints.directory} has no "
            f"complete checkpoint; put it back, use another --workdir, or remove {metrics}"
        )


def _check_same_run(stored: Mapping[str, Any], run: Run, directory: epath.Path) -> None:
    """Refuses to continue with another run's state; prints which other fields have changed.

    A field that was not saved with the state may have any value: an imported state has few fields.
    """
    changed = [name for name in sorted(stored) if stored[name] != run.fields.get(name)]
    lines = [f"{name} was {stored[name]}, is {run.fields.get(name)}" for name in changed]
    if refused := [line for name, line in zip(changed, lines, strict=True) if name in run.fixed]:
        raise UserError(
            f"{directory} belongs to another run: {'; '.join(refused)}; "
            "set it back or use another --workdir"
        )
    for line in lines:
        say(f"{run.name}: note: {line}")
