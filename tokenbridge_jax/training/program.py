"""What a training run computes: its recipe, its state, and the programs of its step."""

import dataclasses
import functools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from tokenbridge_jax.data.workers import cores
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training.optimizer import OptimizerConfig, RunNumbers, make_optimizer
from tokenbridge_jax.training.state import TrainState, abstract_state
from tokenbridge_jax.training.step import Task, make_train_step

# XLA works on a program with little more than one core. Hosts of few cores compile a program when
# it is needed: they gain nothing by threads (docs/performance.md).
CORES_PER_PROGRAM = 4

# Updates whose programs are compiled together. Runs of few updates do not need all programs.
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
        """The program for batches and draws like these, abstract or not; `run` then uses it."""
        kind = jax.tree.structure(draw)
        if kind not in self._compiled:
            compiled: Future[Any] = Future()
            compiled.set_result(self._lower(batch, draw).compile())
            self._compiled[kind] = compiled
        return self._compiled[kind].result()

    def compile_ahead(self, batch: Any, draws: Iterable[Any]) -> None:
        """Compiles the program for the first draw; then starts threads that compile the others.

        `run` waits for the program that it needs, and raises what went wrong with it. A process
        that ends waits for those that are being compiled. With few cores nothing is compiled here.

        Several processes of a job compile a program when they need it: on GPUs they share the work
        of choosing algorithms, for which they must do the same at the same time.
        """
        kinds = {jax.tree.structure(draw): draw for draw in draws}
        threads = cores() // CORES_PER_PROGRAM
        if threads < 2 or jax.process_count() > 1:
            return
        self.compile(batch, next(iter(kinds.values())))
        # Tracing in several threads at a time would give programs of another text in every run,
        # which `runtime/compilation_cache.py` would not recognise.
        lowered = {
            kind: self._lower(batch, draw)
            for kind, draw in kinds.items()
            if kind not in self._compiled
        }
        if lowered:
            say(f"compiling {len(lowered)} more programs of the training step")
            pool = ThreadPoolExecutor(threads)
            for kind, program in lowered.items():
                self._compiled[kind] = pool.submit(program.compile)
            pool.shutdown(wait=False)

    def _lower(self, batch: Any, draw: Any) -> jax.stages.Lowered:
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
        )
        return self.trace(batch, draw).lower()

    @functools.cached_property
    def _placed_numbers(self) -> RunNumbers:
        with jax.transfer_guard("allow"):  # Once.
            return meshes.to_global(self.numbers, self.mesh)

    def run(self, state: TrainState, batch: Any, draw: Any) -> Any:
        """Runs the step."""
        compiled = self._compiled.get(jax.tree.structure(draw))
        step = self.step if compiled is None else compiled.result()
        return step(state, batch, draw, self._placed_numbers)
