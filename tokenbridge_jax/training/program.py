"""What a training run computes: its recipe, its state, and the programs of its step."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.compilation_cache import compile_beside_others
from tokenbridge_jax.runtime.hardware import host_cores, host_memory
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training.optimizer import OptimizerConfig, RunNumbers, make_optimizer
from tokenbridge_jax.training.state import TrainState, abstract_state
from tokenbridge_jax.training.step import Task, make_train_step

# Threads compile where each program has so many cores and bytes of the host's memory to itself. XLA
# works on a program with little more than one core, and the loader and Python need some. Hosts of
# two cores gain nothing by threads (docs/performance.md). For size L, five programs for a GPU took
# 16 GB together, and one for a TPU 4 GB.
CORES_PER_PROGRAM = 4
MEMORY_PER_PROGRAM = 8 * 2**30

# `compile_ahead` looks at so many draws at most. Runs of few updates do not need all programs.
LOOKAHEAD = 5000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run trains and for how long, and how often it reports and saves.

    Attributes:
      optimizer: its settings, and the number of updates.
      batch_size: images in an update, over all processes.
      ema_decay: decay of the average of the parameters; see `step.make_train_step`.
      accumulation: number of micro-batches in a batch.
      log_every: updates between two lines of `metrics.jsonl`; the last update has a line, too.
      checkpoint_every: updates between two checkpoints; the last update has one, too.
      keep: how many of the latest checkpoints are kept.
      keep_every: checkpoints of multiples of this step are also kept; 0 is none.
    """

    optimizer: OptimizerConfig
    batch_size: int
    ema_decay: float
    accumulation: int
    log_every: int
    checkpoint_every: int
    keep: int
    keep_every: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes on a mesh.

    Each kind of draw (the static part of what the host decides for an update) has a program of its
    own. JAX compiles it when it is first needed, unless it was compiled before.

    Attributes:
      mesh: the devices.
      optimizer: of optax.
      abstract: shapes, dtypes and layout of the state.
      step: the jitted step.
      numbers: arguments of the step that are the same in every update.
    """

    mesh: Mesh
    optimizer: Any
    abstract: TrainState
    step: Any
    numbers: RunNumbers
    _compiled: dict[Any, Future[Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(cls, task: Task, recipe: Recipe, seed: int, mesh: Mesh) -> "Program":
        """Makes the program of a run; nothing is compiled."""
        optimizer, _ = make_optimizer(recipe.optimizer)
        abstract = abstract_state(task.init, optimizer, mesh)
        step = make_train_step(
            task,
            functools.partial(make_optimizer, recipe.optimizer),
            abstract,
            mesh,
            ema_decay=recipe.ema_decay,
            accumulation=recipe.accumulation,
        )
        return cls(mesh, optimizer, abstract, step, RunNumbers.of(recipe.optimizer, seed))

    def trace(self, batch: Any, draw: Any) -> jax.stages.Traced:
        """Traces the step for an abstract batch and draws like this one."""
        everywhere = meshes.replicated(self.mesh)
        scalars = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            (draw, self.numbers),
        )
        with meshes.use_mesh(self.mesh):
            return self.step.trace(self.abstract, batch, *scalars)

    def compile(self, batch: Any, draw: Any) -> Any:
        """The program for an abstract batch and draws like this one; `run` then uses it.

        All batches of a `Program` have the same shapes.
        """
        kind = jax.tree.structure(draw)
        if kind not in self._compiled:
            compiled: Future[Any] = Future()
            compiled.set_result(self._compile(batch, draw))
            self._compiled[kind] = compiled
        return self._compiled[kind].result()

    def compile_ahead(self, batch: Any, draws: Iterable[Any]) -> None:
        """Compiles the program for the first draw; then starts threads that compile the others.

        `run` waits for the program that it needs, and raises what went wrong with it. A process
        that ends waits for programs that are being compiled, because XLA cannot be stopped. With
        few cores, or little memory, nothing is compiled here.

        Several processes of a job compile a program when they need it: on GPUs they share the work
        of choosing algorithms, for which they must do the same at the same time.
        """
        threads = min(host_cores() // CORES_PER_PROGRAM, host_memory() // MEMORY_PER_PROGRAM)
        if threads < 2 or jax.process_count() > 1:
            return
        kinds = {jax.tree.structure(draw): draw for draw in itertools.islice(draws, LOOKAHEAD)}
        batch = jax.tree.map(  # A thread that waits would keep the arrays.
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
        )
        self.compile(batch, next(iter(kinds.values())))
        missing = {kind: draw for kind, draw in kinds.items() if kind not in self._compiled}
        if missing:
            say(f"programs of the training step that are compiled meanwhile: {len(missing)}")
            pool = ThreadPoolExecutor(threads)
            for kind, draw in missing.items():
                self._compiled[kind] = pool.submit(self._compile, batch, draw)
            pool.shutdown(wait=False)

    def cancel(self) -> None:
        """Gives up the programs that no thread has begun to compile."""
        for kind in [kind for kind, future in self._compiled.items() if future.cancel()]:
            del self._compiled[kind]

    def _compile(self, batch: Any, draw: Any) -> Any:
        with meshes.use_mesh(self.mesh):
            return compile_beside_others(lambda: self.trace(batch, draw).lower())

    @functools.cached_property
    def _placed_numbers(self) -> RunNumbers:
        with jax.transfer_guard("allow"):  # Once.
            return meshes.to_global(self.numbers, self.mesh)

    def compiling(self, draw: Any) -> Future[Any] | None:
        """The program for this draw, if `run` would wait until a thread has compiled it."""
        compiled = self._compiled.get(jax.tree.structure(draw))
        return None if compiled is None or compiled.done() else compiled

    def run(self, state: TrainState, batch: Any, draw: Any) -> Any:
        """Runs the step."""
        compiled = self._compiled.get(jax.tree.structure(draw))
        step = self.step if compiled is None else compiled.result()
        return step(state, batch, draw, self._placed_numbers)
