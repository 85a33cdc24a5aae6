"""Checkpoints: saving and loading on any mesh; damage and wrong shapes are reported."""

import gc
import logging
import os
import re
import resource
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import flipped, no_more_files, outcome
from toy import ToyTask, toy_batch, toy_training

from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training import checkpoints as ckpt
from tokenbridge_jax.training import checksums, orbax_errors
from tokenbridge_jax.training.checkpoints import Checkpoints
from tokenbridge_jax.training.optimizer import OptimizerConfig, make_optimizer
from tokenbridge_jax.training.state import TrainState, abstract_state


@pytest.fixture(scope="module")
def trained():
    """A toy state after one update on a 2 x 2 x 2 mesh, and its abstract counterpart."""
    mesh = meshes.make_mesh(2, 2, 2)
    abstract, state, step = toy_training(ToyTask(), mesh)
    with meshes.use_mesh(mesh):
        state, _ = step(state, meshes.to_global(toy_batch(0), mesh), None)
    return abstract, state


RECORD = {"seed": 7, "order": [1, 0]}


def save(directory, state, *steps, **keep):
    """Writes checkpoints of these steps."""
    checkpoints = Checkpoints(directory, **keep)
    for step in steps:
        checkpoints.save(state, step, RECORD)
    checkpoints.close()
    return checkpoints


@pytest.fixture
def saved(trained, tmp_path):
    """Checkpoints 1 and 2 in a folder of their own."""
    return save(tmp_path / "checkpoints", trained[1], 1, 2, keep=3)


@pytest.fixture
def large(tmp_path):
    """Checkpoints 1 and 2 of arrays that are too large for OCDBT's index, and their state."""
    rng = np.random.default_rng(0)
    parts = [{"kernel": jnp.asarray(rng.normal(size=(30, 50)).astype(np.float32))} for _ in "123"]
    state = TrainState(jnp.int32(2), *parts)
    return save(tmp_path / "checkpoints", state, 1, 2, keep=3), state


def abstract_of(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def on_one_device(abstract):
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[3:4])
    replicated = meshes.replicated(mesh)
    return jax.tree.map(lambda leaf: leaf.update(sharding=replicated), abstract)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def truncate(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert files
    for path in files:
        os.truncate(path, 3)


def test_a_state_is_restored_bit_for_bit_on_any_mesh(trained, saved):
    abstract, state = trained
    state = state.replace(step=jnp.int32(2))
    same = saved.restore(abstract, 2)
    assert_equal(same, state)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(b)), same, abstract)
    other = saved.restore(on_one_device(abstract), 2)
    assert_equal(other, state)
    assert other.params["first"]["kernel"].sharding.device_set == {jax.devices()[3]}


def test_ema_loads_alone_in_another_dtype(trained, saved):
    abstract, state = trained
    truncate(saved.directory / "2" / "opt_state")
    loaded = ckpt.load_params(
        saved.directory, on_one_device(abstract.ema_params), dtype=jnp.bfloat16
    )
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), state.ema_params)
    assert_equal(loaded, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_run_record_is_a_json_file(saved):
    assert ckpt.run_record(saved.directory, 1) == ckpt.run_record(saved.directory) == RECORD
    assert storage.read_json(next((saved.directory / "2" / "run").glob("*.json"))) == RECORD


@pytest.mark.parametrize(
    ("keep_every", "runs", "kept"),
    [(0, [(1, 2, 3)], ["2", "3"]), (3, [(1, 2, 3, 4, 5), (6, 7)], ["3", "6", "7"])],
)
def test_the_latest_and_multiples_of_a_step_are_kept(trained, tmp_path, keep_every, runs, kept):
    for steps in runs:  # The second run continues the first.
        save(tmp_path, trained[1], *steps, keep=2, keep_every=keep_every)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_checkpoint_in_an_object_store_counts_when_committed(trained, tmp_path, monkeypatch):
    """In a local folder, which is written like an object store."""
    monkeypatch.setattr(storage, "in_object_store", lambda path: True)
    save(tmp_path, trained[1], 1, 2, keep=3)
    (tmp_path / "2" / "commit_success.txt").unlink()  # As if killed before that was written.
    again = Checkpoints(tmp_path, keep=3)
    assert (again.latest, again.incomplete) == (1, [2])
    assert_equal(again.restore(trained[0], 1).params, trained[1].params)
    again = save(tmp_path, trained[1], 2, keep=3)
    assert again.latest == 2
    assert_equal(again.restore(trained[0], 2).opt_state, trained[1].opt_state)


def test_every_leaf_that_does_not_fit_is_named(trained, saved):
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=0.1, total_steps=1))
    abstract = abstract_state(ToyTask(width=16).init, optimizer, meshes.make_mesh(2, 2, 2))
    params = dict(abstract.params)
    params["third"] = params.pop("second")
    params["first"] = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), params["first"])
    with pytest.raises(UserError) as caught:
        saved.restore(abstract.replace(params=params), 2)
    first, *leaves = str(caught.value).split("\n  ")
    # params: 2 + 2 + 2; ema_params, mu, nu: first/bias, first/kernel, second/kernel each.
    assert first.endswith(f"{saved.directory}/2 does not fit this model; arrays that differ: 15")
    assert leaves[:3] == [
        "params/first/bias: checkpoint has float32[8], model needs bfloat16[16]",
        "params/first/kernel: checkpoint has float32[4, 8], model needs bfloat16[4, 16]",
        "params/second/bias: in the checkpoint, not in the model",
    ]
    assert len(leaves) == len(set(leaves)) == 15
    wide = abstract.replace(params=trained[0].params, opt_state=trained[0].opt_state)
    with pytest.raises(UserError, match=r"(?s)ema_params/first/bias.*\[16, 3\]$"):
        saved.restore(wide, 2)
    more = trained[0].params | {"third": {"bias": params["third"]["bias"]}}
    with pytest.raises(UserError, match=r"params/third/bias: not in the checkpoint$"):
        saved.restore(trained[0].replace(params=more), 2)


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_damaged_files_are_named(trained, saved, part):
    truncate(saved.directory / "2" / part)
    with pytest.raises(UserError, match=f"{saved.directory}/2 is missing or damaged.*{part}"):
        saved.restore(trained[0], 2)
    assert_equal(saved.restore(trained[0], 1).params, trained[1].params)


def files_of(checkpoint, *parts):
    paths = [path for part in parts for path in (checkpoint / part).rglob("*") if path.is_file()]
    return sorted([checkpoint / checksums.FILE, *paths])


def is_reported(read, path, checkpoint, expected):
    """Whether the damage of `path` is reported. If not, the values read must be those saved."""
    found, message = outcome(read)
    if not message:
        assert_equal(found, expected)
        return False
    name = re.escape(str(path.relative_to(checkpoint)))
    assert re.fullmatch(rf"checkpoint {checkpoint} is missing or damaged \(.*{name}.*", message)
    assert "--step=1" in message
    assert not re.search("remove|delete", message)
    return True


def test_a_flipped_bit_is_reported_or_harmless(large):
    """In every file. Most bits of the file of arrays belong to arrays."""
    checkpoints, state = large
    checkpoint, rng = Path(checkpoints.directory / "2"), np.random.default_rng(0)
    abstract = abstract_of(state.ema_params)

    def read():
        record = ckpt.run_record(checkpoints.directory)
        return record, ckpt.load_params(checkpoints.directory, abstract)

    reported = {}
    for path in files_of(checkpoint, "ema_params", "run"):
        in_arrays = "ocdbt.process_0/d" in str(path)
        for bit in rng.choice(8 * path.stat().st_size, 8 if in_arrays else 2, replace=False):
            with flipped(path, int(bit)):
                expected = RECORD, state.ema_params
                found = is_reported(read, path, checkpoint, expected)
            reported.setdefault(path.relative_to(checkpoint).as_posix(), []).append(found)
    arrays = next(found for name, found in reported.items() if "ocdbt.process_0/d" in name)
    assert sum(arrays) >= 4  # The other bits belong to nodes that were replaced.
    harmless = {name for name, found in reported.items() if not all(found)} - {
        name for name in reported if "ocdbt.process_0/" in name
    }
    assert not harmless
    assert len(reported) >= 8


def test_a_bit_of_an_array_is_reported_even_if_orbax_cannot_check(trained, saved, monkeypatch):
    """Then the list of checksums includes the files of arrays."""
    monkeypatch.setattr(checksums, "protect_arrays", lambda: False)
    checksums.write(saved.directory / "2")
    checkpoint = Path(saved.directory / "2")
    (path,) = (checkpoint / "params" / "ocdbt.process_0" / "d").iterdir()
    read = lambda: saved.restore(trained[0], 2)  # noqa: E731
    for bit in (100, 8 * path.stat().st_size - 1):
        with flipped(path, bit):
            assert is_reported(read, path, checkpoint, None)


def test_other_parts_and_checkpoints_without_checksums_load(large):
    checkpoints, state = large
    abstract = abstract_of(state)
    (path,) = (checkpoints.directory / "2" / "opt_state" / "ocdbt.process_0" / "d").iterdir()
    with flipped(Path(path), 8000):
        assert_equal(ckpt.load_params(checkpoints.directory, abstract.ema_params), state.ema_params)
        with pytest.raises(UserError, match=r"opt_state/ocdbt\.process_0/d/.*, array kernel: ZSTD"):
            checkpoints.restore(abstract, 2)
    (checkpoints.directory / "2" / checksums.FILE).unlink()  # Earlier versions wrote none.
    assert_equal(checkpoints.restore(abstract, 2), state)


def test_a_checkpoint_that_the_system_does_not_open_is_not_called_damaged(trained, saved):
    with pytest.raises(UserError) as caught, no_more_files():
        ckpt.load_params(saved.directory, trained[0].ema_params, step=2)
    assert re.match(r"cannot read .*/2/.*: Too many open files; .*ulimit -n", str(caught.value))
    with pytest.raises(UserError, match="Too many open files"), no_more_files():
        ckpt.latest_step(saved.directory)


@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_file_that_cannot_be_opened_is_named(trained, saved, has_checksums):
    """Also if shapes are read before the checksums, and if there are no checksums."""
    path = saved.directory / "2" / "params" / "_METADATA"
    path.unlink()
    os.symlink(path, path)
    if not has_checksums:
        (saved.directory / "2" / checksums.FILE).unlink()
    for any_shape in ((), ("w",)):
        with pytest.raises(UserError, match=f"cannot read {path}: Too many levels of symbolic"):
            saved.restore(trained[0], 2, any_shape=any_shape)


def test_damaged_run_record_and_missing_step_are_named(trained, saved):
    truncate(saved.directory / "2" / "run")
    with pytest.raises(UserError, match=f"{saved.directory}/2 is missing or damaged"):
        ckpt.run_record(saved.directory, 2)
    with pytest.raises(UserError, match=f"{saved.directory}/9 is missing or damaged"):
        saved.restore(trained[0], 9)
    with pytest.raises(UserError, match="there is no checkpoint in"):
        ckpt.latest_step(saved.directory.parent / "nowhere")


def test_reads_that_orbax_abandons_are_silent(monkeypatch):
    """After an error, Orbax leaves coroutines that it has not started, and Python warns of them."""

    async def late():
        pass

    def abandon(name):
        late.__qualname__ = name
        late()
        gc.collect()

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda x: reported.append(str(x.exc_value)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orbax_errors.quiet_from_now_on()
        abandon("Store._get_array_metadatas")
        warnings.simplefilter("error")  # Before the filter: now Python calls the hook.
        abandon("Store._get_array_metadatas")
        abandon("late")
    assert reported == ["coroutine 'late' was never awaited"]


def test_unfinished_checkpoints_are_ignored(trained, saved):
    directory = saved.directory
    # A kill while writing leaves a folder with a suffix. An unfinished copy lacks parts.
    (directory / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (directory / "4" / "params").mkdir(parents=True)
    again = Checkpoints(directory, keep=3)
    assert again.latest == ckpt.latest_step(directory) == 2
    assert again.incomplete == [4]
    save(directory, trained[1], 4, keep=3)
    assert not (directory / "5.orbax-checkpoint-tmp").exists()
    assert ckpt.latest_step(directory) == 4
    assert_equal(ckpt.load_params(directory, trained[0].ema_params), trained[1].ema_params)


def test_nothing_is_written_before_it_opens_and_loggers_are_restored(trained, tmp_path):
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [list(logger.filters) for logger in loggers]
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest is None
    checkpoints.close()
    assert not (tmp_path / "new").exists()
    checkpoints.save(trained[1], 1, {})
    checkpoints.close()
    assert ckpt.run_record(tmp_path / "new") == {}
    assert [list(logger.filters) for logger in loggers] == before


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    assert checkpoints.latest is None
    with pytest.raises(UserError, match=r"cannot write .*file/checkpoints: Not a directory"):
        checkpoints.open()
    checkpoints.close()


def test_the_folder_may_be_relative(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("run/checkpoints", trained[1], 2)
    loaded = ckpt.load_params("run/checkpoints", trained[0].ema_params)
    assert_equal(loaded, trained[1].ema_params)


def test_a_failed_write_is_reported_and_keeps_the_last_checkpoint(saved):
    """A limit on file sizes replaces a full disk: Orbax handles both in the same way."""
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
    state = TrainState(jnp.int32(3), large, large, large)
    checkpoints = Checkpoints(saved.directory)

    def save_and_wait():
        checkpoints.save(state, 3, RECORD)
        checkpoints.wait()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"cannot write {saved.directory}: File too large"):
            save_and_wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()  # Does not fail again.
    assert sorted(path.name for path in saved.directory.iterdir()) == ["1", "2"]
    assert saved.latest == 2
