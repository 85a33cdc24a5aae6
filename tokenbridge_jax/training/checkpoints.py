"""Checkpoints of a run: `DIRECTORY/STEP/{params, ema_params, opt_state, run}`, written by Orbax.

Each part has its own folder, so that the EMA can be loaded alone, on any mesh, in any dtype. The
folder of a step gets its name when it is complete. In an object store, where a folder cannot be
renamed at once, it gets a `commit_success.txt` instead. So the remains of a killed save are never
read, and the next start removes them. `STEP` is the number of updates done; `run` is JSON that
describes the run. Checksums cover all files (`checksums.py`), and loading verifies them.
"""

import contextlib
import errno
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training import checksums, orbax_errors
from tokenbridge_jax.training.state import TrainState

PARTS = ("params", "ema_params", "opt_state")

# Orbax writes this into a complete folder of an object store.
COMMIT_FILE = "commit_success.txt"


class Checkpoints:
    """The checkpoints of one run. Saving copies to the host and writes in the background."""

    def __init__(self, directory: epath.PathLike, keep: int = 2, keep_every: int = 0):
        """Prepares to read and write `directory`; `open` makes it.

        Args:
          directory: local, or in an object store (gs://).
          keep: how many of the latest checkpoints are kept.
          keep_every: checkpoints of multiples of this step are also kept; 0 is none.
        """
        self.directory = _absolute(directory)
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._kept = policies.AnyPreservationPolicy(kept)
        self._checkpointer: Any = None
        self._saving = 0
        self._quiet = contextlib.ExitStack()

    def open(self) -> None:
        """Makes the folder and removes unfinished checkpoints; `save` calls it if necessary.

        Raises:
          UserError: the folder cannot be written.
        """
        if self._checkpointer is not None:
            return
        checksums.protect_arrays()
        context = _context(self.directory)
        # Called when the files of a checkpoint are written, before it counts as complete. A lambda,
        # because Orbax would copy a method, and `self` with it.
        context.async_options.post_finalization_callback = lambda: self._write_checksums()
        with self._write_errors():
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                context=context,
                preservation_policy=self._kept,
                cleanup_tmp_directories=True,
            )
        # Orbax's threads log at any time until it is closed.
        self._quiet.enter_context(orbax_errors.quiet())

    @property
    def latest(self) -> int | None:
        """Updates done at the latest complete checkpoint."""
        return max(_steps(self.directory), default=None)

    @property
    def incomplete(self) -> list[int]:
        """Steps after the latest complete one, whose folders lack a part."""
        latest = self.latest or 0
        return sorted(s for s in _steps(self.directory, complete=False) if s > latest)

    def save(self, state: TrainState, step: int, run: dict[str, Any]) -> None:
        """Waits for the save before it, and starts to save `state` after `step` updates.

        After the return the state may be donated.

        Args:
          state: on any mesh.
          step: equal to `state.step`, which the caller knows without waiting for the device.
          run: JSON that describes the run.

        Raises:
          UserError: this save or the one before it could not be written.
        """
        self.open()
        with self._write_errors():
            self._checkpointer.wait()
            self._saving = step
            self._checkpointer.save_checkpointables_async(
                step,
                {part: _plain(getattr(state, part)) for part in PARTS} | {"run": run},
                force=True,
                # If there is a folder of this step, it is incomplete.
                overwrite=True,
            )

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: it could not be written.
        """
        if self._checkpointer is not None:
            with self._write_errors():
                self._checkpointer.wait()

    def close(self) -> None:
        """Waits until the last save is on disk, and releases the folder."""
        if self._checkpointer is not None:
            with self._quiet, self._write_errors():
                self._checkpointer.close()
            self._checkpointer = None

    def restore(
        self, abstract: TrainState, step: int, any_shape: Collection[str] = ()
    ) -> TrainState:
        """Loads a state, laid out by the shardings of `abstract`.

        Args:
          abstract: from `state.abstract_state`, on any mesh.
          step: which checkpoint.
          any_shape: names of leaves that may have another shape, and are loaded with it.

        Raises:
          UserError: leaves differ in name, shape or dtype (all are named), or the files are
            damaged.
        """
        wanted = {part: getattr(abstract, part) for part in PARTS}
        if any_shape:
            path = self.directory / str(step)
            wanted = {
                part: _as_stored(tree, _stored(path, part), any_shape)
                for part, tree in wanted.items()
            }
        loaded = _load(self.directory, step, wanted)
        number = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(step=number, **loaded)

    def _write_checksums(self) -> None:
        unfinished = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        checksums.write(next(iter(unfinished), self.directory / str(self._saving)))

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Reports a failed write in one line, and removes its unfinished files."""
        try:
            yield
        except Exception as error:
            reason = orbax_errors.system_error(error)
            if reason is None:
                raise
            self._remove_leftovers()
            raise storage.write_error(self.directory, reason) from error

    def _remove_leftovers(self) -> None:
        """Frees the disk space of a failed write, while its other threads may still write."""
        for _ in range(20):
            leftovers = list(self.directory.glob("*.orbax-checkpoint-tmp*"))
            if not leftovers:
                return
            for leftover in leftovers:
                with contextlib.suppress(OSError):
                    leftover.rmtree(missing_ok=True)
            time.sleep(0.05)


def latest_step(directory: epath.PathLike) -> int:
    """Updates done at the latest complete checkpoint under `directory`.

    Raises:
      UserError: there is none.
    """
    directory = _absolute(directory)
    if steps := _steps(directory):
        return max(steps)
    raise UserError(f"there is no checkpoint in {directory}; train first, or check --workdir")


def run_record(directory: epath.PathLike, step: int | None = None) -> dict[str, Any]:
    """The JSON saved with a checkpoint; without a step, with the latest."""
    return _load(directory, step, {"run": None})["run"]


def load_params(
    directory: epath.PathLike,
    abstract_params: Any,
    *,
    part: str = "ema_params",
    dtype: Any = None,
    step: int | None = None,
) -> Any:
    """Loads only the EMA parameters, or only those without averaging.

    Args:
      directory: a run's `checkpoints` folder.
      abstract_params: tree of `jax.ShapeDtypeStruct` with shardings, on any mesh.
      part: "ema_params" or "params".
      dtype: of the floating-point leaves; None is that of `abstract_params`.
      step: which checkpoint; None is the latest.

    Raises:
      UserError: no checkpoint, other leaves (all are named), or damaged files.
    """

    def cast(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.update(dtype=dtype) if dtype is not None and floating else leaf

    wanted = jax.tree.map(cast, abstract_params)
    return _load(directory, step, {part: wanted}, any_dtype=True)[part]


def _absolute(directory: epath.PathLike) -> epath.Path:
    """An absolute path; Orbax takes no other."""
    path = epath.Path(directory)
    return path if storage.in_object_store(path) else path.absolute()


def _load(
    directory: epath.PathLike, step: int | None, wanted: dict[str, Any], *, any_dtype: bool = False
) -> dict[str, Any]:
    """Loads the named parts of a checkpoint (None: the latest), in the structure of `wanted`."""
    path = _absolute(directory) / str(latest_step(directory) if step is None else step)
    plain = {name: _plain(part) for name, part in wanted.items()}
    with _read_errors(path), _context(path):
        checksums.verify(path, plain)
        problems = []
        for name, part in plain.items():
            if part is not None:
                problems += differences(name, _stored(path, name), part, any_dtype)
        if problems:
            count = (
                f"checkpoint {path} does not fit this model; arrays that differ: {len(problems)}"
            )
            raise UserError("\n  ".join([count, *problems]))
        # One by one, because after an error in one part Orbax reports the parts not yet read, too.
        loaded = {
            name: ocp.load_checkpointables(path, {name: part})[name] for name, part in plain.items()
        }
    return {
        name: loaded[name] if part is None else _with_structure_of(part, loaded[name])
        for name, part in wanted.items()
    }


def _stored(path: epath.Path, name: str) -> Any:
    """Shapes and dtypes of one part on disk."""
    with _read_errors(path):
        stored = ocp.metadata(path, name).metadata
        if stored is None:  # Orbax has only logged the reason.
            raise ValueError(f"part {name} cannot be read")
    return stored


def _as_stored(wanted: Any, stored: Any, leaves: Collection[str]) -> Any:
    """`wanted` with the stored shapes of these leaves, which every device gets complete."""
    shapes = traverse_util.flatten_dict(stored)

    def of_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        if names[-1] not in leaves or names not in shapes or shapes[names].shape == leaf.shape:
            return leaf
        everywhere = meshes.replicated(leaf.sharding.mesh)
        return jax.ShapeDtypeStruct(shapes[names].shape, leaf.dtype, sharding=everywhere)

    return jax.tree.map_with_path(of_leaf, wanted)


@contextlib.contextmanager
def _read_errors(path: epath.Path) -> Iterator[None]:
    """Reports in one line why the checkpoint at `path` cannot be read.

    Files that the system refuses (rights, too many open files, a failing disk) are not damaged.
    """
    try:
        with orbax_errors.quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # Damaged files make Orbax raise anything.
        orbax_errors.quiet_from_now_on()
        parts = (path / name for name in (*PARTS, "run"))
        refused = next(filter(None, map(orbax_errors.refused, parts)), None)
        reason = refused or orbax_errors.system_error(error)
        if reason is not None and reason.errno not in (None, errno.ENOENT):
            raise storage.read_error(reason.filename or path, reason) from error
        earlier = max((s for s in _steps(path.parent) if s < int(path.name)), default=None)
        advice = (
            "there is none before it; put back a copy of it"
            if earlier is None
            else f"the one before it is of step {earlier}: --step={earlier} loads it, and training "
            f"continues from it if you move the folder {path.name} elsewhere"
        )
        raise UserError(
            f"checkpoint {path} is missing or damaged ({orbax_errors.reason(error)}); {advice}"
        ) from error


def differences(name: str, stored: Any, wanted: Any, any_dtype: bool = False) -> list[str]:
    """One line for each leaf that is missing, not wanted, or of another shape or dtype."""

    def describe(leaf: Any) -> str:
        return f"{'' if any_dtype else np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    have = traverse_util.flatten_dict(stored, sep="/")
    want = traverse_util.flatten_dict(wanted, sep="/")
    lines = []
    for leaf in sorted(have.keys() | want.keys()):
        if leaf not in have:
            lines.append(f"{name}/{leaf}: not in the checkpoint")
        elif leaf not in want:
            lines.append(f"{name}/{leaf}: in the checkpoint, not in the model")
        else:
            found, expected = describe(have[leaf]), describe(want[leaf])
            if found != expected:
                lines.append(f"{name}/{leaf}: checkpoint has {found}, model needs {expected}")
    return lines


def _plain(tree: Any) -> Any:
    """A tree as nested dicts with string keys: files do not depend on the classes of optimizers."""
    if tree is None:
        return None
    leaves, _ = jax.tree.flatten_with_path(tree)
    return traverse_util.unflatten_dict({_names(path): leaf for path, leaf in leaves})


def _with_structure_of(tree: Any, plain: Any) -> Any:
    """Inverse of `_plain`."""
    flat = traverse_util.flatten_dict(plain)
    return jax.tree.map_with_path(lambda path, _: flat[_names(path)], tree)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _context(path: epath.Path) -> ocp.Context:
    """Orbax's options: `run` is a readable JSON file."""
    context = ocp.Context()
    if storage.in_object_store(path):  # Orbax chooses this in gs:// only.
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    registry = ocp.handlers.local_registry(include_global_registry=True)
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="run")
    context.checkpointables.registry = registry
    # Each copy of an array writes a slice of it, unless it is small: each shape needs a program.
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    return context


def _steps(directory: epath.Path, *, complete: bool = True) -> list[int]:
    """Steps of the complete (or else the incomplete) checkpoints in `directory`, in no order.

    (Orbax's own listing counts a folder without all its parts, such as an unfinished copy, as
    complete.)

    Raises:
      UserError: a folder cannot be listed.
    """
    if not directory.is_dir():
        return []
    signs = {*PARTS, "run"} | ({COMMIT_FILE} if storage.in_object_store(directory) else set())
    try:
        names = [path.name for path in directory.iterdir() if path.name.isdigit()]
        return [int(n) for n in names if (_names_in(directory / n) >= signs) == complete]
    except OSError as error:
        raise storage.read_error(error.filename or directory, error) from error


def _names_in(path: epath.Path) -> set[str]:
    try:
        return {inner.name for inner in path.iterdir()}
    except (FileNotFoundError, NotADirectoryError):  # Another process may just have removed it.
        return set()
